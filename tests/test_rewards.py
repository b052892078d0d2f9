"""Rewards by name, and preference pairs from scores."""

import itertools
import math
import sys

import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.rewards import labels, words
from dpo_jax.rewards.registry import get_reward

TEXTS, SCORES = ["a", "b", "c", "d"], [0.0, 2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("Lily was happy. She smiled and hugged her friend.", 4.0),
        ("Tom was sad and cried.", -2.0),
        ("The HAPPY cat was sad.", 0.0),
        ("unhappy", -1.0),
        ("A fund for badminton, happening on a saddle", 0.0),  # words, not parts of words
        ("The box was red.", 0.0),
        ("", 0.0),
    ],
)
def test_happy(completion, score):
    assert get_reward("happy")(["sad sad prompt"], [completion]) == [score]


def test_no_word_is_both_happy_and_sad():
    assert not words.HAPPY & words.SAD
    assert min(len(words.HAPPY), len(words.SAD)) > 60


def test_synthetic_is_the_reward_of_the_data_source():
    from dpo_jax.data.sources import synthetic
    from dpo_jax.rewards.registry import get_reward

    texts = [" Great, superb!", " Awful."]
    found = get_reward("synthetic")(["", ""], texts)
    assert found.tolist() == [synthetic.synthetic_reward("", text) for text in texts]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "scale = 2\n"
        "def length(prompts, completions): return [scale * len(c) for c in completions]\n"
        "def as_trl(completions, **kwargs): return [float(len(p) > 3) for p in kwargs['prompts']]\n"
        "def nan(prompts, completions): return [float('nan')]\n"
        "def none(prompts, completions): return [None]\n"
        "def short(prompts, completions): return [1.0]\n"
        "def single(prompt, completion): return 1.0\n"
    )
    (tmp_path / "broken_reward.py").write_text("import there_is_no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("my_reward", "broken_reward"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("module")
def test_a_function_of_a_module():
    scores = get_reward("my_reward:length")(["p", "prompt"], ["four", ""])
    assert scores.tolist() == [8.0, 0.0]
    assert scores.dtype == np.float64
    assert get_reward("my_reward:as_trl")(["p", "prompt"], ["four", ""]).tolist() == [0.0, 1.0]


@pytest.mark.usefixtures("module")
def test_a_score_for_each_completion():
    with pytest.raises(UserError, match="1 scores for 2 completions"):
        get_reward("my_reward:short")(["p", "p"], ["a", "b"])


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hapy", "unknown reward 'hapy'; did you mean 'happy'?"),
        ("absent_module_x:f", "cannot import 'absent_module_x'"),
        (":f", "cannot import ''"),
        ("broken_reward:f", "broken_reward imports 'there_is_no_such_module', which is not installed"),
        ("my_reward:lenght", "my_reward has no 'lenght'; did you mean 'length'?"),
        ("my_reward:", "my_reward has no ''"),
        ("my_reward:scale", "'my_reward:scale' is a"),
        ("my_reward:single", "my_reward:single' must take the keywords prompts and completions"),
        ("logistic:absent.json", "absent.json: cannot be read as JSON"),
        ("logistik", "did you mean 'logistic:FILE'?"),
        ("vader:", "cannot import 'vader'"),
    ],
)
def test_unknown_rewards_are_refused_in_one_line(name, message):
    with pytest.raises(UserError) as error:
        get_reward(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize("name", ["my_reward:nan", "my_reward:none"])
def test_a_score_that_is_not_a_finite_number_is_refused(name):
    with pytest.raises(UserError, match=rf"reward '{name}': the score of 'text'"):
        get_reward(name)(["prompt"], ["text"])


def test_ranked():
    pairs = labels.label_pairs("x", TEXTS, SCORES, "ranked", 0)
    assert pairs == [("b", "a"), ("c", "a"), ("d", "a"), ("b", "c"), ("d", "c")]  # b and d have one score


def test_best_worst():
    assert labels.label_pairs("x", TEXTS, SCORES, "best_worst", 0) == [("b", "a")]
    assert labels.label_pairs("x", TEXTS, [1.0] * 4, "best_worst", 0) == []
    assert labels.label_pairs("x", [], [], "best_worst", 0) == []


def test_bradley_terry_has_all_pairs_of_distinct_completions():
    pairs = labels.label_pairs("x", TEXTS, SCORES, "bradley_terry", 0)
    assert {frozenset(pair) for pair in pairs} == {frozenset(pair) for pair in itertools.combinations(TEXTS, 2)}
    assert len(pairs) == 6
    assert len(labels.label_pairs("x", ["a", "b", "a", "a"], SCORES, "bradley_terry", 0)) == 3


@pytest.mark.parametrize("difference", [-1.5, 0.0, 0.5, 3.0])
def test_bradley_terry_frequencies(difference):
    n = 4000
    prompts = [f"prompt {i}" for i in range(n)]
    pairs = [labels.label_pairs(p, ["a", "b"], [difference, 0.0], "bradley_terry", 1)[0] for p in prompts]
    p = 1 / (1 + math.exp(-difference))
    assert abs(pairs.count(("a", "b")) - n * p) <= 4 * math.sqrt(n * p * (1 - p))  # 4 standard deviations


def test_bradley_terry_is_certain_at_the_extremes():
    assert labels.label_pairs("x", ["a", "b"], [1e4, -1e4], "bradley_terry", 0) == [("a", "b")]
    assert labels.label_pairs("x", ["a", "b"], [-1e4, 1e4], "bradley_terry", 0) == [("b", "a")]


def test_draws_depend_on_seed_and_prompt_alone():
    def draws(prompts, seed):
        return [tuple(labels.label_pairs(p, TEXTS, [0.0] * 4, "bradley_terry", seed)) for p in prompts]

    prompts = [f"p{i}" for i in range(50)]
    assert draws(prompts, 0) == draws(prompts[::-1], 0)[::-1]
    assert draws(prompts, 0) != draws(prompts, 1)
    assert len(set(draws(prompts, 0))) > 20


@pytest.mark.parametrize("how", ["bradley_terry", "ranked", "best_worst"])
def test_a_text_is_never_paired_with_itself(how):
    assert labels.label_pairs("x", ["a", "a"], [0.0, 1.0], how, 0) == []


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_has_no_label(score):
    with pytest.raises(UserError, match="not a finite number"):
        labels.label_pairs("x", ["a", "b"], [0.0, score], "ranked", 0)


def test_an_unknown_label_is_refused():
    with pytest.raises(UserError, match="did you mean 'best_worst'"):
        labels.label_pairs("x", TEXTS, SCORES, "best-worst", 0)
