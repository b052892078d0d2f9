"""Gradient weights of the losses of compared runs: by their formulas, and their place on the page."""

import numpy as np
import pytest
from test_report import run

from dpo_jax import cli, losses
from dpo_jax.commands.gradient_weights import MARGINS, gradient_weight


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
        # With a running mean of 0 and one pair in its step, beta is 0.1 (1 + 0.6 * 0.9 m), at least 1e-3.
        (
            {"name": "beta_dpo", "beta": 0.1},
            (b := np.maximum(0.1 * (1 + 0.54 * MARGINS), 1e-3)) * sigmoid(-b * MARGINS),
        ),
    ],
)
def test_the_weight_is_the_slope_of_the_formula(loss, expected):
    found = gradient_weight(losses.build(loss))
    assert found.shape == MARGINS.shape
    at = abs(MARGINS - 10) > 1e-3  # where hinge has a kink
    np.testing.assert_allclose(found[at], expected[at], rtol=1e-4, atol=1e-6)


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


def test_a_loss_that_is_not_at_hand_is_named(tmp_path, capsys):
    one, two = run(tmp_path / "one"), run(tmp_path / "two")
    (two / "config.yaml").write_text((two / "config.yaml").read_text().replace("name: dpo", "name: nowhere:loss"))
    page, said = report(capsys, tmp_path, one, two)
    assert "Gradient weight" not in page
    assert "no gradient weights: " in said
    assert "nowhere" in said
