"""The metrics file, the progress display, and means with their uncertainty."""

import io
import json
import math

import numpy as np
import pytest
import rich.console

from dpo_jax.errors import UserError
from dpo_jax.intervals import fisher, mean_interval, wilson
from dpo_jax.training.metrics_file import append_metrics, read_metrics, truncate_metrics, with_current_names
from dpo_jax.training.progress import Progress


def test_append_writes_one_json_object_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, 0, 0, {"eval_loss": np.float32(0.5)})
    append_metrics(path, 1, 64, {"loss": float("nan"), "grad_norm": math.inf, "count": 3, "note": "x"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "examples": 0, "eval_loss": 0.5},
        {"step": 1, "examples": 64, "loss": None, "grad_norm": None, "count": 3, "note": "x"},
    ]
    assert read_metrics(path)[1]["grad_norm"] is None


@pytest.mark.parametrize("torn", ["", '{"step": 4, "exam', '{"step": 4, "examples": 4, "loss": 0.5}', "\x00\x00"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, torn):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    for step in range(6):
        append_metrics(whole, step, step, {"loss": 1 / (step + 1)})
    for step in range(4):
        append_metrics(resumed, step, step, {"loss": 1 / (step + 1)})
    with resumed.open("a") as file:
        file.write(torn)
    truncate_metrics(resumed, 2)
    assert [row["step"] for row in read_metrics(resumed)] == [0, 1, 2]
    for step in range(3, 6):
        append_metrics(resumed, step, step, {"loss": 1 / (step + 1)})
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


def test_truncate_keeps_lines_of_the_step_and_their_nulls(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, 2, 2, {"loss": math.nan})
    append_metrics(path, 2, 2, {"eval_loss": 1.0})
    truncate_metrics(path, 2)
    assert [row.get("eval_loss") for row in read_metrics(path)] == [None, 1.0]
    truncate_metrics(path, 1)
    assert path.read_text() == ""


def test_metrics_of_older_runs_have_todays_names():
    """Their `kl` is minus the log-ratio; the interval of a negative is turned round."""
    old = {"step": 3, "loss": 0.5, "kl": 2.5, "logratios/chosen": -1.0}
    assert with_current_names(old) == {"step": 3, "loss": 0.5, "logratio": -2.5, "logratios/chosen": -1.0}
    ratios = {"eval_logratios/rejected": 1.0}
    assert with_current_names({"eval_kl": None} | ratios) == {"eval_logratio": None} | ratios
    # A loss without a reference has no log-ratios, but may have rewards (SimPO): evaluated against a reference that the
    # user names, it has the KL alone.
    for free in ({"eval_kl": 2.0, "eval_loss": 1.0}, {"eval_kl": 2.0, "eval_rewards/margins": 1.0}):
        assert with_current_names(free) == free
    of_eval = {"eval_kl": {"mean": 1.0, "low": 0.5, "high": 2.0, "n": 9}, "kl(policy || reference)": {"mean": 5.0}}
    assert with_current_names(of_eval) == {
        "eval_logratio": {"mean": -1.0, "low": -2.0, "high": -0.5, "n": 9}, "eval_kl": {"mean": 5.0},
    }  # fmt: skip
    for new in ({"logratio": 1.0}, {"eval_logratio": -2.5, "eval_kl": 12.0}, {"eval_kl": 12.0, "eval_logratio": 1.0}):
        assert with_current_names(new) == new


def test_truncate_of_no_file_makes_none(tmp_path):
    truncate_metrics(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_line_torn_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(path)


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


def shown(terminal, steps, seconds, every=10.0):
    """Returns what a display of 10 steps of 8 comparisons prints."""
    out, clock = io.StringIO(), Clock()
    console = rich.console.Console(file=out, force_terminal=terminal, width=200)
    with Progress(10, 8, console=console, clock=clock, every=every) as progress:
        for step in steps:
            clock.now = step * seconds
            progress.update(step, {"loss": 0.5, "rewards/accuracies": 0.75, "logps/chosen": -3.0, "grad_norm": None})
    return out.getvalue()


def test_progress_prints_the_first_and_last_step_and_one_line_in_ten_seconds():
    lines = shown(False, range(1, 11), 4.0).splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "7/10", "10/10"]
    assert lines[0] == "step 1/10  loss 0.5  rewards/accuracies 0.75"
    # 8 comparisons in 4 s; 6 steps of 4 s are left after step 4
    assert lines[1] == "step 4/10  loss 0.5  rewards/accuracies 0.75  2 comparisons/s  0:00:24 left"


def test_progress_of_a_resumed_run_counts_only_its_own_steps():
    lines = shown(False, range(6, 11), 1.0, every=0.0).splitlines()
    assert "comparisons/s" not in lines[0]
    assert lines[1].endswith("8 comparisons/s  0:00:03 left")


def test_progress_on_a_terminal_is_a_bar():
    text = shown(True, range(1, 11), 1.0)
    assert "10/10" in text
    assert "━" in text
    assert "8 comparisons/s" in text


def test_mean_interval_by_hand():
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(1.959964 * math.sqrt(5 / 3) / 2, rel=1e-6)  # s^2 = 5/3, n = 4


def test_mean_interval_with_weights():
    assert mean_interval([1.0, 2.0], [3.0, 1.0])[0] == 1.25
    values = [0.3, 1.0, 5.0, 2.0]
    plain = mean_interval(values)
    assert mean_interval(values, [0.25] * 4) == pytest.approx(plain)
    assert mean_interval(np.array([*values, 99.0]), np.array([2.0] * 4 + [0.0])) == pytest.approx(plain)
    # sum w^2 (x - m)^2 = 9 / 16 + 9 / 16, n / (n - 1) = 2, sum w = 4
    assert mean_interval([1.0, 2.0], [3.0, 1.0])[1] == pytest.approx(1.959964 * 1.5 / 4, rel=1e-6)


def test_mean_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [mean_interval(rng.exponential(size=200)) for _ in range(1000)]
    covered = sum(abs(mean - 1.0) <= half for mean, half in intervals)
    assert 920 <= covered <= 965


def test_mean_interval_of_one_and_of_none():
    assert mean_interval([2.0]) == (2.0, math.inf)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([1.0], [0.0])


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z^2 = 3.841459
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),  # z^2 / (n + z^2)
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.25529, 0.36621),  # Newcombe 1998, table I: 0.2553 to 0.3662
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-6)


@pytest.mark.parametrize("n", [3, 48, 2000])  # where rounding leaves 1e-16 and less of the formula's 0
def test_wilson_is_exact_at_its_ends(n):
    """A figure draws mean - low, which must not be negative."""
    assert wilson(0, n)[0] == 0
    assert wilson(n, n)[1] == 1
    assert wilson(n * (1 - 2**-53), n)[1] <= 1


def test_wilson_bounds_solve_its_equation():
    for p in wilson(7.5, 20):
        assert abs(7.5 / 20 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 20), rel=1e-6)


@pytest.mark.parametrize("successes", [-1, 11])
def test_wilson_refuses_successes_outside_of_n(successes):
    with pytest.raises(ValueError, match="of 10"):
        wilson(successes, 10)


def test_fishers_interval():
    """r = 0.5 of 28 pairs: atanh(0.5) = 0.5493 within 1.96 / 5, so 0.1573 and 0.9413 before they are turned back."""
    low, high = fisher(0.5, 28)
    assert (low, high) == pytest.approx((math.tanh(0.5493061 - 0.3919928), math.tanh(0.5493061 + 0.3919928)), abs=1e-6)
    assert fisher(0.0, 3) == (-1.0, 1.0)
    assert fisher(1.0, 10) == (1.0, 1.0)
