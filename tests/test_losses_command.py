"""The page on losses, from the command line."""

import inspect
import re

import numpy as np
import pytest

from dpo_jax import cli, losses, losses_command
from dpo_jax.records import UserError


def said(capsys, *argv):
    cli.run(["losses", *argv])
    return capsys.readouterr().out


def test_every_loss_is_described_from_its_own_docstring_and_signature():
    for name, entry in losses.REGISTRY.items():
        found = losses_command.describe(name)
        defaults = {k: p.default for k, p in inspect.signature(entry.function).parameters.items() if k != "lp"}
        assert found.hyper == defaults
        assert re.fullmatch(r"\D+ (19|20)\d\d, arXiv \d{4}\.\d{5}(, .+)?", found.paper), name
        assert any("loss = " in line for line in found.formula), name
        assert found.title
        assert "(" not in found.title


def test_a_description():
    found = losses_command.describe("dpo")
    assert found.title == "Direct preference optimization; smoothed, conservative DPO"
    assert found.paper == "Rafailov et al. 2023, arXiv 2305.18290, eq. 7"
    assert found.formula == ("z = beta (c - r)", "loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)")
    assert found.hyper == {"beta": 0.1, "label_smoothing": 0.0}
    assert found.takes == "pairs, soft labels, f-divergences"
    assert losses_command.describe("bco").takes == "pairs, or single responses, a step at once"
    assert losses_command.describe("sft").takes == "responses, no reference"


def test_the_table_names_all_of_it(capsys):
    page = said(capsys)
    for name in losses.REGISTRY:
        assert re.search(rf"│ {name} +│", page), name
    for part in ("label_smoothing 0.001", "q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)", "arXiv 2402.00856"):
        assert part in page
    assert page.endswith(losses_command.NOTATION[-1] + "\n")


def test_names_choose(capsys):
    page = said(capsys, "hinge", "kto")
    assert [name for name in losses.REGISTRY if re.search(rf"│ {name} +│", page)] == ["hinge", "kto"]


def test_help(capsys):
    assert said(capsys, "--help").startswith("usage: dpo-jax losses [NAME ...] [--plot FILE.svg]\n")


def test_curves_are_of_the_losses_of_a_margin():
    curves = losses_command.curves(list(losses.REGISTRY))
    drawn = {name: curve for label, curve in curves.items() for name in label.split(", ")}
    ranked = {"plackett_luce", "lipo"}  # of two responses
    pairwise = {"dpo", "sigmoid_norm", "ipo", "ipo_sum", "hinge", "robust", "exo_pair", "discopop", "odpo", "r_dpo"}
    assert set(drawn) == pairwise | ranked | {"simpo"}
    at = losses_command.MARGINS.tolist().index(2.0)
    value, gradient = (part[at] for part in drawn["dpo"])
    assert value == pytest.approx(np.log1p(np.exp(-2)), rel=1e-5)
    assert gradient == pytest.approx(-1 / (1 + np.exp(2)), rel=1e-5)
    value, gradient = (part[at] for part in drawn["ipo"])
    assert [value, gradient] == pytest.approx([1.5**2, 3.0], rel=1e-5)
    assert "dpo, sigmoid_norm, r_dpo, plackett_luce" in curves  # the same for a token a response


def test_the_plot_is_one_figure_with_both(capsys, tmp_path):
    out = tmp_path / "figures" / "losses.svg"
    assert said(capsys, "--plot", str(out)) == f"wrote {out}\n"
    text = out.read_text()
    assert text.startswith("<svg")
    for part in ("d loss / d margin", "hinge", "discopop", "dpo, sigmoid_norm, r_dpo, plackett_luce"):
        assert part in text
    assert said(capsys, "hinge", "--plot", str(out))
    assert "discopop" not in out.read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["simpoo"], r"unknown loss 'simpoo'; did you mean 'simpo'\?"),
        (["--beta", "0.1"], "takes names of losses, then --plot"),
        (["--plot"], "takes names of losses, then --plot"),
        (["--plot", "x.png"], r"--plot x.png: give the name of an .svg file"),
        (["kto", "--plot", "x.svg"], "--plot: none of kto is a function of the margin alone"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        cli.run(["losses", *argv])
