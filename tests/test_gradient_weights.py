"""Gradient weights of the losses of compared runs: by their formulas, and their place on the page."""

import json
import types

import jax
import numpy as np
import pytest
from test_report import run

from dpo_jax import cli, losses
from dpo_jax.commands import gradient_weights, sweep
from dpo_jax.commands.gradient_weights import MARGINS, gradient_weight, loss_titles
from dpo_jax.training.run_folder import run_config


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({"name": "dpo", "beta": 0.2}, 0.2 * sigmoid(-0.2 * MARGINS)),
        ({"name": "ipo_sum", "beta": 0.1}, -2 * (MARGINS - 5)),
        ({"name": "ipo", "beta": 0.1}, -2 * (MARGINS / 20 - 5) / 20),  # of 20 tokens
        ({"name": "hinge", "beta": 0.1}, np.where(MARGINS < 10, 0.1, 0.0)),
        ({"name": "simpo", "beta": 2.0, "gamma": 0.5}, 0.1 * sigmoid(0.5 - 0.1 * MARGINS)),
        ({"name": "sft"}, np.full(len(MARGINS), 0.5)),
        # Two terms, one of them weighted: c is half the margin.
        (
            [{"name": "dpo", "beta": 0.2, "weight": 3.0}, {"name": "sft"}],
            0.6 * sigmoid(-0.2 * MARGINS) + 0.5,
        ),
        # Beside the pair, a tenth of M and S, M is 0 and S the deviation of all margins: (m - 0.1 m) / 0.9 S.
        (
            {"name": "alpha_dpo", "beta": 2.0, "gamma": 0.5, "alpha": 0.25, "decay": 0.9},
            0.1 * sigmoid(0.5 + 0.5 * MARGINS / np.std(MARGINS, ddof=1) - 0.1 * MARGINS),
        ),
        # With a running mean of 0 and one pair in its step, beta is 0.1 (1 + 0.6 * 0.9 m), at least 1e-3.
        (
            {"name": "beta_dpo", "beta": 0.1},
            (b := np.maximum(0.1 * (1 + 0.54 * MARGINS), 1e-3)) * sigmoid(-b * MARGINS),
        ),
    ],
)
def test_the_weight_is_the_gradient_of_the_formula(loss, expected):
    found = gradient_weight(losses.build(loss))
    assert found.shape == MARGINS.shape
    at = abs(MARGINS - 10) > 1e-3  # where hinge has a kink
    np.testing.assert_allclose(found[at], expected[at], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_loss_has_a_finite_weight_near_a_margin_of_0():
    for name in losses.REGISTRY:
        found = gradient_weight(losses.build(name), np.array([-1.0, 0.0, 1.0]))
        assert np.isfinite(found).all(), name


def report(capsys, tmp_path, *runs):
    out = tmp_path / "page.html"
    cli.run_command(["report", *map(str, runs), "--out", str(out)])
    return out.read_text(), capsys.readouterr().out


def test_the_page_of_runs_of_other_losses_has_them_side_by_side(tmp_path, capsys):
    one, two = run(tmp_path / "one", beta=0.1), run(tmp_path / "two", beta=0.5)
    again = run(tmp_path / "again", beta=0.1)
    page, _ = report(capsys, tmp_path, one, two, again)
    assert "Gradient weight" in page
    for text in ("one, again", "dpo beta 0.1", "two", "dpo beta 0.5"):
        assert text in page
    assert "Gradient weight" not in report(capsys, tmp_path, one, again)[0]  # one loss
    assert "Gradient weight" not in report(capsys, tmp_path, one)[0]


def test_the_comparison_of_a_sweep_has_them_too_on_the_device_that_trained(tmp_path, capsys, monkeypatch):
    """Of runs of other losses; none of runs of one loss."""
    asked, interval = [], json.dumps({"metrics": {"eval_loss": {"mean": 1, "low": 0, "high": 2, "n": 3}}})
    folders = [run(tmp_path / f"loss.beta={beta}", beta=beta, eval_json=interval) for beta in (0.1, 0.5)]
    folders += [run(tmp_path / f"seed={seed}", eval_json=interval) for seed in (1, 2)]
    monkeypatch.setattr(jax.config, "update", lambda *given: asked.append(given))
    for chosen, there in ((folders[:2], True), (folders[2:], False)):
        configs = [types.SimpleNamespace(run=str(folder), loss=run_config(folder).loss) for folder in chosen]
        monkeypatch.setattr(sweep, "sweep_configs", lambda *_, configs=configs: configs)
        monkeypatch.setattr(sweep, "train_all", lambda *_: (None, []))
        sweep.sweep_command(["a.yaml", "--loss.beta", "0.1,0.5"])
        page = (tmp_path / "report.html").read_text()
        assert ("Gradient weight" in page) == there
        assert ("dpo beta 0.5" in page) == there
    assert ("jax_platforms", "cpu") not in asked
    assert "no gradient weights" not in capsys.readouterr().out


def test_a_loss_that_is_not_at_hand_is_named(tmp_path, capsys):
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace("name: dpo", "name: nowhere:loss"))
    page, said = report(capsys, tmp_path, one, two)
    assert "Gradient weight" not in page
    assert "no gradient weights: " in said
    assert "nowhere" in said


FAILING = """
import jax.numpy as jnp

def loss(lp, *, beta=0.1):
    if lp.policy.shape[0] == 1:
        raise ValueError("two at least\\nplease")
    return beta * (lp.policy[:, 1] - lp.policy[:, 0])
"""


def test_a_loss_that_fails_at_these_pairs_leaves_the_page(tmp_path, capsys, monkeypatch):
    (tmp_path / "failing_at_one.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    file = two / "config.yaml"
    file.write_text(file.read_text().replace("name: dpo", "name: failing_at_one:loss"))
    page, said = report(capsys, tmp_path, one, two)
    assert "rewards/margins" in page
    assert "Gradient weight" not in page
    assert said.splitlines()[0] == "no gradient weights: ValueError: two at least"


def test_the_gradient_weights_are_computed_on_a_cpu(tmp_path, capsys, monkeypatch):
    """An accelerator may be another run's."""
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *given: asked.append(given))
    monkeypatch.setattr(gradient_weights, "gradient_weight_panels", lambda runs: asked.append(runs) or [])
    runs = [run(tmp_path / "one"), run(tmp_path / "two", beta=0.5)]
    report(capsys, tmp_path, *runs)
    assert asked == [("jax_platforms", "cpu"), runs]


def titles(folder, *texts):
    found = []
    for i, text in enumerate(texts):
        (made := folder / str(i)).mkdir()
        (made / "config.yaml").write_text(f"model: {{path: m}}\nloss: {text}\n")
        found.append(run_config(made).loss)
    return loss_titles(found)


def test_a_title_has_the_options_in_which_losses_differ(tmp_path):
    points = titles(tmp_path, "{link: squared, target: constant}", "{link: savage}", "{link: savage, scale: 2}")
    assert points == [
        "axes link squared target constant scale 1",
        "axes link savage target zero scale 1",
        "axes link savage target zero scale 2",
    ]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("{name: dpo}", "{name: dpo, label_smoothing: 0.1}"), ["dpo label_smoothing 0", "dpo label_smoothing 0.1"]),
        (("{name: simpo, gamma: 1}", "{name: simpo, gamma: 2.5}"), ["simpo gamma 1", "simpo gamma 2.5"]),
        (("{name: dpo, wpo: true}", "{name: dpo}"), ["dpo wpo True", "dpo wpo False"]),
        (("{name: dpo, beta: 0.1}", "{name: ipo, beta: 0.1}"), ["dpo", "ipo"]),
        (
            ("[{name: dpo}, {name: sft, weight: 0.5}]", "[{name: dpo}, {name: sft, weight: 2}]", "{name: hinge}"),
            ["dpo weight 1 + sft weight 0.5", "dpo weight 1 + sft weight 2", "hinge weight 1"],
        ),
    ],
)
def test_a_title_leaves_out_what_losses_have_in_common(texts, expected, tmp_path):
    assert titles(tmp_path, *texts) == expected
