"""`dpo-jax losses`: descriptions, the table and the plot."""

import inspect
import re
import types

import numpy as np
import pytest

from dpo_jax import cli, losses
from dpo_jax.commands import leaderboard
from dpo_jax.commands.losses import (
    MARGINS,
    NOTATION,
    LossCurve,
    describe_loss,
    loss_curves,
    panel_rows,
    write_plot,
)
from dpo_jax.errors import UserError
from dpo_jax.experiments.standings import BUDGETS
from dpo_jax.losses import objective
from dpo_jax.pages import figure


def said(capsys, *argv):
    cli.run_command(["losses", *argv])
    return capsys.readouterr().out


def test_every_loss_is_described_from_its_own_docstring_and_signature():
    for name, entry in losses.REGISTRY.items():
        found = describe_loss(name)
        defaults = {k: p.default for k, p in inspect.signature(entry.function).parameters.items() if k != "lp"}
        assert found.hyper == defaults
        assert re.fullmatch(r"\D+ (19|20)\d\d, arXiv \d{4}\.\d{5}(, .+)?", found.paper), name
        assert any("loss = " in line for line in found.formula), name
        assert found.title
        assert "(" not in found.title


def test_a_description():
    found = describe_loss("dpo")
    assert found.title == "Direct preference optimization; smoothed, conservative DPO"
    assert found.paper == "Rafailov et al. 2023, arXiv 2305.18290, eq. 7"
    assert found.formula == ("z = beta (c - r)", "loss = -(1 - eps) log sigmoid(z) - eps log sigmoid(-z)")
    assert found.hyper == {"beta": 0.1, "label_smoothing": 0.0}
    assert found.takes == "pairs, soft labels, f-divergences"
    assert describe_loss("bco").takes == "pairs, or single responses, whole batches"
    assert describe_loss("sft").takes == "responses, no reference"
    assert describe_loss("kto").takes == "pairs, and responses to other prompts, or single responses, whole batches"
    assert describe_loss("tpo").takes == "gold, chosen and rejected responses, no reference"


def test_the_table_names_all_of_it(capsys):
    page = said(capsys)
    for name in losses.REGISTRY:
        assert re.search(rf"│ {name} +│", page), name
    for part in ("label_smoothing 0.001", "q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)", "arXiv 2402.00856"):
        assert part in page
    assert NOTATION[-1] + "\n" in page
    for option in (
        option for function in objective.OPTIONS for option in inspect.signature(function).parameters.values()
    ):
        if option.kind is option.KEYWORD_ONLY:
            assert re.search(rf"\n  {option.name} {re.escape(str(option.default))} +\w", page), option.name


def test_names_choose(capsys):
    page = said(capsys, "hinge", "kto")
    assert [name for name in losses.REGISTRY if re.search(rf"│ {name} +│", page)] == ["hinge", "kto"]


def test_help(capsys):
    usage = "usage: dpo-jax losses [NAME[,OPTION=VALUE] | AXIS=VALUE,... ...] [--plot [FILE.svg]] "
    assert " ".join(said(capsys, "--help").split()).startswith(usage)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def curves():
    return loss_curves(list(losses.REGISTRY))


@pytest.mark.slow
def test_every_loss_has_a_curve_which_may_depend_on_the_margin_only(curves):
    drawn = {name: curve for label, curve in curves.items() for name in label.split(", ")}
    assert set(drawn) == set(losses.REGISTRY)
    ranked = {"plackett_luce", "lipo", "exo_rw", "tpo", "tpo_l"}  # of two responses, or beside a constant third
    pairwise = {"dpo", "sigmoid_norm", "ipo", "ipo_sum", "hinge", "robust", "exo_pair", "discopop", "odpo", "r_dpo"}
    pairwise |= {"axes", "hypo", "rpo_sq", "rpo_bwd", "rpo_fwd"}
    assert {name for name, curve in drawn.items() if curve.margin_only} == pairwise | ranked | {
        "simpo",
        "bradley_terry",
    }
    # The same for one token per response and a neutral reference.
    assert "dpo, sigmoid_norm, r_dpo, hypo, plackett_luce, axes, bradley_terry" in curves


@pytest.mark.parametrize(
    ("name", "value", "slope"),  # at a margin of 2: log-ratios 1 and -1, log-probs -3 and -5, beta 1
    [
        ("dpo", np.log1p(np.exp(-2)), -sigmoid(-2)),
        ("ipo", 1.5**2, 3.0),
        ("sppo_hard", 2 * 0.5**2, 2 * 0.5),  # (c - 1/2)^2 + (r + 1/2)^2 with c = m / 2, r = -m / 2
        ("apo_zero", 2 * sigmoid(-1), -sigmoid(1) * sigmoid(-1)),
        ("kto", sigmoid(-1), -0.5 * sigmoid(1) * sigmoid(-1)),  # a KL of 0
        ("unlikelihood", 3 - 0.5 * 5, -0.75),
        ("sft", 3.0, -0.5),
        ("aot", np.log1p(np.exp(-2)), -sigmoid(-2)),
        ("beta_dpo", np.log1p(np.exp(-2 * 2.08)), -2.08 * sigmoid(-2 * 2.08)),  # beta 1 + 0.6 * 0.9 * 2, a constant
    ],
)
def test_curves(name, value, slope):
    at = MARGINS.tolist().index(2.0)
    curve = loss_curves([name])[name]
    assert [curve.value[at], curve.gradient[at]] == pytest.approx([value, slope], rel=1e-5)


def test_options_of_every_term_are_in_the_curves():
    """A rejected response of half the policy and half the reference (BDPO); twice the weight is twice the value."""
    plain, twice, mixed = (
        loss_curves([f"dpo{more}"])[f"dpo{more}"] for more in ("", ",weight=2", ",rejected_mixture=0.5")
    )
    np.testing.assert_allclose(twice.value, 2 * plain.value, rtol=1e-6)
    ratio = np.log(0.5 * np.exp(-MARGINS / 2) + 0.5)  # of the mixture with the reference to the reference
    np.testing.assert_allclose(mixed.value, np.log1p(np.exp(ratio - MARGINS / 2)), rtol=1e-5)
    assert list(loss_curves(["link=savage,divergence=js", "link=savage"])) == [
        "link=savage,divergence=js",
        "link=savage",
    ]


@pytest.mark.slow
def test_the_plot_is_one_figure_with_both(capsys, tmp_path):
    out = tmp_path / "figures" / "losses.svg"
    assert said(capsys, "--plot", str(out)) == f"wrote {out}\n"
    text = out.read_text()
    assert text.startswith("<svg")
    for part in (
        "d loss / d margin",
        "hinge",
        "discopop",
        "dpo, sigmoid_norm, r_dpo,",
        "hypo, plackett_luce,",
        "kto",
        "at c = -r",
    ):
        assert part in text
    assert said(capsys, "hinge", "--plot", str(out))
    assert not [part for part in ("discopop", "at c = -r") if part in out.read_text()]


@pytest.mark.slow
def test_a_panel_has_at_most_six_losses_of_one_kind(curves):
    rows = panel_rows(curves)
    assert {label: curve for row in rows for label, curve in row.items()} == curves
    counts = [sum(len(label.split(", ")) for label in row) for row in rows]
    assert sum(counts) == len(losses.REGISTRY)
    assert max(count for count, row in zip(counts, rows, strict=True) if len(row) > 1) <= 6
    kinds = [{curve.margin_only for curve in row.values()} for row in rows]
    assert kinds == sorted(kinds, key=lambda kind: kind != {True})
    assert all(len(kind) == 1 for kind in kinds)
    long = {f"{', '.join('abcdefg')}": LossCurve(0, 0, True), "h": LossCurve(0, 0, True)}
    assert panel_rows(long) == [{", ".join("abcdefg"): LossCurve(0, 0, True)}, {"h": LossCurve(0, 0, True)}]


@pytest.mark.slow
def test_every_panel_has_a_readable_legend(curves, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure, "set_svg_id", lambda fig: drawn.append(fig) or "")
    write_plot(tmp_path / "losses.svg", list(losses.REGISTRY))
    axes, rows = drawn[0].axes, panel_rows(curves)
    assert len(axes) == 2 * len(rows)
    for value, gradient, row in zip(axes[::2], axes[1::2], rows, strict=True):
        texts = [text.get_text().replace("\n", " ") for text in gradient.get_legend().get_texts()]
        assert texts == [*row]
        assert len(value.lines) == len(gradient.lines) == len(row)
        assert len({line.get_color() for line in value.lines}) == len(row)
        assert all(text.get_fontsize() >= 9 for text in gradient.get_legend().get_texts())


def test_points_of_the_axes_are_shown_and_drawn(capsys, tmp_path):
    page = said(capsys, "ipo", "link=savage,beta=2")
    for part in ("axes: log_ratio_mean, pair,", "link savage", "beta 2.0"):
        assert part in page
    found = loss_curves(["link=savage", "score=log_prob,link=exponential,target=constant,scale=0.5"])
    savage, exponential = (found[name] for name in found)
    at = MARGINS.tolist().index(2.0)
    expected = [sigmoid(-2) ** 2, -2 * sigmoid(-2) ** 2 * sigmoid(2)]
    assert [savage.value[at], savage.gradient[at]] == pytest.approx(expected, rel=1e-5)
    assert [exponential.value[at], exponential.gradient[at]] == pytest.approx([np.exp(-1.5), -np.exp(-1.5)], rel=1e-5)
    assert savage.margin_only
    out = tmp_path / "points.svg"
    assert said(capsys, "link=savage", "link=probit", "--plot", str(out)) == f"wrote {out}\n"
    assert "link=probit" in out.read_text()


def test_a_name_takes_options_and_a_point_is_written_for_a_config(capsys):
    page = said(capsys, "ipo,beta=0.2", "odpo,offset=linear", "bco,all_steps=true", "chi_po", "kto", "dpo")
    logistic = "ranking: pair, link: logistic, target: {}, beta: 0.1, label_smoothing: 0.0"
    ipo = "ranking: pair, link: squared, target: zero, beta: 0.4, weight: 6.25"
    for line in (
        f"ipo,beta=0.2       loss: {{score: log_ratio_mean, {ipo}}}\n",
        f"odpo,offset=linear loss: {{score: log_ratio, {logistic.format('gap')}, scale: 1.0}}\n",
        f"chi_po             loss: {{score: chi_squared, {logistic.format('zero')}}}  # within the clip at twice",
        f"dpo                loss: {{score: log_ratio, {logistic.format('zero')}}}\n",
    ):
        assert f"\n  {line}" in page
    for part in ("offset linear", "beta 0.2", "loss bco is no point of the"):
        assert part in page
    assert not re.search(r"\n  (kto|bco).* loss: ", page)
    assert "as points of the axes" not in said(capsys, "kto")


def test_what_a_point_takes_is_that_of_its_options(capsys):
    page = " ".join(said(capsys, "ranking=pointwise", "target=gap").split())
    for part in ("pairs, or single responses, soft", "pairs, f-divergences, scores"):
        assert part in page


def test_options_of_a_name_are_drawn():
    found = loss_curves(["hinge,beta=2"])["hinge,beta=2"]
    at = MARGINS.tolist().index(0.25)
    assert [found.value[at], found.gradient[at]] == pytest.approx([0.5, -2.0])


def test_words_of_a_legend_stay_whole():
    label = "score=log_prob,link=exponential,target=constant,scale=0.5, dpo, sigmoid_norm, plackett_luce"
    lines = figure.wrap_text(label, 30).split("\n")
    assert lines == [
        "score=log_prob,",
        "link=exponential,",
        "target=constant,scale=0.5,",
        "dpo, sigmoid_norm,",
        "plackett_luce",
    ]
    assert figure.wrap_text("a_word_longer_than_the_width b", 10) == "a_word_longer_than_the_width\nb"


def test_a_leaderboard_of_one_loss_says_so():
    limit = types.SimpleNamespace(mean=1.0)
    path = types.SimpleNamespace(reward=np.zeros((1, 1, 1, 1)), kl=0.0, betas=())
    found = types.SimpleNamespace(paths={"dpo": path}, seeds=2, steps=3, limits=([limit] * len(BUDGETS), limit))
    assert leaderboard.summary(found)[0].startswith("1 loss, 2 worlds, 3 steps of ")
    found.paths["ipo"] = path
    assert leaderboard.summary(found)[0].startswith("2 losses, ")


def test_a_plot_without_a_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, "kto", "--plot") == "wrote losses.svg\n"
    assert "kto" in (tmp_path / "losses.svg").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["simpoo"], r"unknown loss 'simpoo'; did you mean 'simpo'\?"),
        (["sigmoid"], "unknown loss 'sigmoid'; here it is 'dpo'"),
        (["--beta", "0.1"], "takes names, or axes such as link=squared, then --plot"),
        (["--plot", "a.svg", "b.svg"], "takes names, or axes such as link=squared, then --plot"),
        (["link=square"], r"link: 'square' is not one of logistic, squared.*; did you mean 'squared'\?"),
        (["score=odds"], r"score: 'odds' is not one of .*; did you mean 'log_odds'\?"),
        (["odds"], "unknown loss 'odds'; write loss: {score: log_odds}$"),
        (["dpo", "ipo", "dpo"], "dpo-jax losses: dpo is named 2 times; name it once"),
        (["dpo,0.1"], "dpo-jax losses: 'dpo,0.1': '0.1' is no option; write OPTION=VALUE after the name of a loss"),
        (["dpo,"], "'dpo,': '' is no option"),
        (["dpo,bta=1"], "unknown key 'bta'; did you mean 'beta'"),
        (["ipo,beta=-1"], "beta -1.0 is not a finite number above 0"),
        (["link=hinge,rank=pair"], "unknown key 'rank'"),
        (["ranking=list,link=hinge"], "loss axes: ranking list takes link logistic"),
        (["--plot", "x.png"], r"--plot x.png: not an .svg file; name one"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        cli.run_command(["losses", *argv])


def test_a_leaderboard_refuses_a_loss_that_is_named_twice():
    with pytest.raises(UserError, match="dpo-jax leaderboard --losses: dpo is named 2 times; name it once"):
        cli.run_command(["leaderboard", "--losses", "dpo", "ipo", "dpo"])
