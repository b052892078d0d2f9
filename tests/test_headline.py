"""The headline of a report: values, intervals and verdicts of metrics made by hand; samples, times and old names."""

import json
import math

import pytest
from test_pages import METRICS, described, shown_by
from test_report import metrics_json, page, run

from dpo_jax import losses
from dpo_jax.intervals import wilson
from dpo_jax.pages.headline import headlines, number_texts, percent_texts, preference_verdict, reward_verdict
from dpo_jax.pages.metrics import (
    WORDS,
    Measured,
    last_values,
    metric_wording,
    read_intervals,
    with_minutes,
)
from dpo_jax.pages.run import ReportedRun, sample_table

ACCURACY, MARGIN, LOGP = "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"
LOGRATIO = "eval_logratio"
LIKELIHOOD = {LOGP: Measured(-40.0, -41.0, -39.0, 200)}  # all that a loss without a reference has
OF_A_POLICY = LIKELIHOOD | {LOGRATIO: Measured(-1.0, -1.5, -0.5, 200)}


def right_in(count, n):
    """Returns the accuracy of `count` right of n, with its interval."""
    return Measured(count / n, *wilson(count, n), n)


@pytest.mark.parametrize(
    ("count", "n", "word", "sentence"),
    [  # Wilson's intervals: 142/200 .6436 to .7684; 58/200 .2316 to .3564; 106/200 .4608 to .5979; 2/2 .3424 to 1
        (142, 200, "better", "71% of 200 held-out comparisons (64 to 77%): better than the reference at the 95% "
         "level."),
        (58, 200, "worse", "29% of 200 held-out comparisons (23 to 36%): worse than the reference at the 95% level."),
        (106, 200, "undecided", "53% of 200 held-out comparisons (46 to 60%): undecided, because the interval "
         "includes 50%, as the reference has."),
        (2, 2, "undecided", "100% of 2 held-out comparisons (34 to 100%): undecided, because the interval includes "
         "50%, as the reference has."),
        (5150, 10000, "better", "52% of 10,000 held-out comparisons (51 to 52%): better than the reference at the 95% "
         "level."),  # .5052 to .5248
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_interval(count, n, word, sentence):
    found = preference_verdict(OF_A_POLICY | {ACCURACY: right_in(count, n), MARGIN: Measured(1.0, 0.5, 1.5, n)})
    assert found == (word, f"The policy prefers the chosen response in {sentence}")


def test_no_bound_is_rounded_across_half():
    assert percent_texts(Measured(0.55, 0.504, 0.596)) == ["55.0", "50.4", "59.6"]
    assert percent_texts(Measured(0.5, 0.4504, 0.4996)) == ["50.00", "45.04", "49.96"]
    assert percent_texts(Measured(0.5, 0.45, 0.55)) == ["50", "45", "55"]


@pytest.mark.parametrize(("who", "others"), [("The reward model", {}), ("The policy", LIKELIHOOD)])
def test_without_a_reference_chance_is_what_one_is_compared_with(who, others):
    found = preference_verdict(others | {ACCURACY: right_in(142, 200), MARGIN: Measured(1.0, 0.5, 1.5, 200)})
    assert found == ("better", f"{who} ranks the chosen response first in 71% of 200 held-out comparisons "
                     "(64 to 77%): better than chance at the 95% level.")  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.02, 0.22, "better"), (-0.22, -0.02, "worse"), (-0.10, 0.30, "undecided")]
)
def test_without_pairs_the_margin_decides(low, high, word):
    mean = (low + high) / 2
    found = preference_verdict(OF_A_POLICY | {MARGIN: Measured(mean, low, high, 9)})
    start = f"The policy rewards chosen responses {mean:.2f} nats more than rejected ones"
    assert found.word == word
    assert found.sentence.startswith(f"{start} ({low:.2f} to {high:.2f}): {word}")


def test_no_verdict_without_an_interval_or_an_evaluation():
    unknown = preference_verdict(OF_A_POLICY | {ACCURACY: Measured(0.9)})
    assert unknown.word == ""
    assert unknown.sentence == (
        "The policy prefers the chosen response in 90% of the held-out comparisons. No verdict: the 95% interval is "
        "unknown; `dpo-jax eval` computes it."
    )
    training = preference_verdict({"rewards/accuracies": Measured(0.9), "logps/chosen": Measured(-4.0)})
    assert training.word == ""
    assert "no evaluation on held-out data" in training.sentence
    assert preference_verdict({"eval_loss": Measured(1.0, 0.9, 1.1, 5)}) is None  # SFT


@pytest.mark.parametrize(
    ("policy", "reference", "word"),
    [
        ((2.13, 1.82, 2.43), (0.0, -0.29, 0.3), "better"),
        ((-1.0, -1.5, -0.5), (0.0, -0.29, 0.3), "worse"),
        ((0.5, 0.2, 0.8), (0.0, -0.29, 0.3), "undecided"),  # a wider test could decide; this one does not over-claim
    ],
)
def test_true_rewards_differ_if_their_intervals_do_not_overlap(policy, reference, word):
    names = ("true reward of the policy", "true reward of the reference")
    found = reward_verdict(dict(zip(names, (Measured(*policy, 90), Measured(*reference, 90)), strict=True)))
    assert found.word == word
    assert f"is {policy[0]:.2f} ({policy[1]:.2f} to {policy[2]:.2f}) for samples of the policy" in found.sentence
    assert reward_verdict({names[0]: Measured(1.0, 0.5, 1.5, 9)}) is None


def test_numbers_have_two_digits_of_their_interval():
    assert number_texts(Measured(2.2504, 1.6659, 2.8389)) == ["2.25", "1.67", "2.84"]
    assert number_texts(Measured(1234.5, 1000.0, 1469.0)) == ["1234", "1000", "1469"]
    assert number_texts(Measured(-0.0001, -0.02, 0.0198)) == ["0.000", "-0.020", "0.020"]
    assert number_texts(Measured(2.25041)) == ["2.25"]
    assert number_texts(Measured(1.0, 1.0, 1.0)) == ["1", "1", "1"]


def cards(final):
    (found,) = headlines([final])
    return [(card.name, card.value, card.interval) for card in found.cards]


def test_the_cards_show_the_sampled_kl_or_else_the_log_ratio():
    final = OF_A_POLICY | {ACCURACY: right_in(142, 200), MARGIN: Measured(0.12, 0.10, 0.14, 200)}
    final |= {"eval_logratio": Measured(-1.9, -2.0, -1.8, 200)}
    first = [("Accuracy", "71%", "64 to 77%"), ("Margin", "0.120 nats", "0.100 to 0.140")]
    assert cards(final) == [*first, ("Log-ratio", "-1.90 nats", "-2.00 to -1.80")]
    final |= {"eval_kl": Measured(2.25, 1.67, 2.83, 90), "true reward of the policy": Measured(2.0, 1.0, 3.0, 90)}
    kl, reward = ("KL from the reference", "2.25 nats", "1.67 to 2.83"), ("True reward", "2.0", "1.0 to 3.0")
    assert cards(final) == [*first, kl, reward]
    assert cards({"eval_loss": Measured(1.36, 1.35, 1.37), "eval_nll": Measured(1.5)}) == [
        ("Loss", "1.360", "1.350 to 1.370"),
        ("NLL", "1.5 nats per token", ""),
    ]


def test_beside_a_run_without_sampled_kl_both_show_the_log_ratio():
    ratio, kl = {"eval_logratio": Measured(-1.9)}, {"eval_kl": Measured(2.25)}
    margin = {MARGIN: Measured(0.12)}
    names = [[card.name for card in found.cards] for found in headlines([margin | ratio, margin | ratio | kl])]
    assert names == [["Margin", "Log-ratio"], ["Margin", "KL from the reference", "Log-ratio"]]


def test_metrics_of_earlier_versions_have_their_present_names(tmp_path):
    stored = {"eval_kl": {"mean": 0.5, "low": 0.25, "high": 1.0, "n": 7}}
    stored["kl(policy || reference)"] = {"mean": 2.0, "low": 1.0, "high": 3.0, "n": 9}
    (tmp_path / "eval.json").write_text(json.dumps({"metrics": stored}))
    assert read_intervals(tmp_path / "eval.json") == {
        "eval_logratio": Measured(-0.5, -1.0, -0.25, 7),
        "eval_kl": Measured(2.0, 1.0, 3.0, 9),
    }


def test_half_an_interval_in_the_lines_of_metrics_counts():
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "eval_kl": 2.0, "eval_kl/half": 0.5, "eval_loss": None}]
    found = last_values(lines)
    assert found.pop("eval_loss")[1:] == (None, None, None)
    assert found == {"eval_kl": Measured(2.0, 1.5, 2.5)}


def test_the_time_is_that_of_the_steps():
    rates = [None, 2.0, 4.0]  # the first step after a start has none
    lines = [{"examples": 120 * (i + 1), "examples_per_second": rate} for i, rate in enumerate(rates)]
    found = with_minutes([lines[0], lines[1], {"examples": 240, "eval_loss": 1.0}, lines[2]])
    assert [line.get("minutes") for line in found] == [0.0, 1.0, None, 1.5]
    assert "examples_per_second" not in found[0]


def sampled(name, *samples):
    rows = [dict(zip(("step", "prompt", "policy", "reference"), (5, *sample), strict=True)) for sample in samples]
    return ReportedRun(name, {}, [], {}, "", {}, [], rows)


def test_samples_of_several_runs_share_a_table():
    one = sampled("one", ("p", "a", "r"), ("q", "b", "s"))
    two = sampled("two", ("q", "c", "s"), ("z", "d", None))
    assert sample_table([one]) == (["prompt", "reference", "policy"], [["p", "r", "a"], ["q", "s", "b"]])
    assert sample_table([one, two]) == (
        ["prompt", "reference", "policy one", "policy two"],
        [["p", "r", "a", "–"], ["q", "s", "b", "c"], ["z", "–", "–", "d"]],
    )
    other = sampled("two", ("q", "c", "another text"))
    head, rows = sample_table([one, other])
    assert head == ["prompt", "reference of one", "reference of two", "policy one", "policy two"]
    assert rows == [["p", "r", "–", "a", "–"], ["q", "s", "another text", "b", "c"]]


def test_the_page_answers_first(tmp_path):
    means = {ACCURACY: 0.5, MARGIN: 0.5, LOGP: -4.0, LOGRATIO: 0.5}
    folder = run(tmp_path / "a", eval_json=metrics_json(means))  # every interval is 0.25 to 0.75
    shown = page(tmp_path, folder)
    verdict = "The policy prefers the chosen response in 50% of 7 held-out comparisons (25 to 75%): undecided"
    assert shown.text.index(verdict) < shown.text.index("Curves") < shown.text.index("Metrics")
    assert "Chance has 50%, and so has a policy equal to its reference." in shown.text[: shown.text.index("Curves")]
    both = page(tmp_path, folder, run(tmp_path / "b", eval_json=metrics_json(means | {"eval_kl": 1.0})))
    assert both.text.count(verdict) == 2
    assert ["run", "verdict", "Accuracy", "Margin", "Log-ratio", "KL from the reference"] in both.rows


@pytest.mark.parametrize("name", [*losses.REGISTRY])
def test_every_metric_of_a_loss_has_a_meaning(name):
    assert not [metric for metric in shown_by({"name": name}) if not metric_wording(metric).meaning]


def test_meanings_are_of_metrics_that_are_described():
    assert set(WORDS) - described(METRICS) <= {"logratio", "minutes"}
    assert metric_wording("eval_loss/sft")[::2] == ("Loss sft", "The term alone, before its weight.")
    assert metric_wording("mine") == ("mine", "", "")


def test_what_is_not_finite_has_no_interval(tmp_path):
    stored = {"a": {"mean": 1.0, "low": -math.inf, "high": math.inf, "n": 1}}
    stored["b"] = {"mean": None, "low": 0, "high": 1, "n": 2}
    (tmp_path / "eval.json").write_text(json.dumps({"metrics": stored}))
    found = read_intervals(tmp_path / "eval.json")
    assert found["a"] == Measured(1.0, None, None, 1)
    assert math.isnan(found["b"].mean)


def test_runs_on_the_same_data_have_one_report_on_it(tmp_path):
    same = [run(tmp_path / name, data_json='["5 pairs"]') for name in "ab"]
    assert page(tmp_path, *same).text.count("5 pairs") == 1
    shown = page(tmp_path, *same, run(tmp_path / "c", data_json='["6 pairs"]')).text
    assert (shown.count("5 pairs"), shown.count("6 pairs")) == (2, 1)
    assert "Data of c" in shown
