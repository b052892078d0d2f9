"""Evaluation: the KL of a policy from its reference against the sum over all responses, and intervals."""

import itertools
import math

import jax
import numpy as np
import pytest

from dpo_jax import evaluation, losses
from dpo_jax.data.table import Table
from dpo_jax.intervals import wilson
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens

VOCAB, EOS = 5, 4


@pytest.fixture(scope="module")
def judge():
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "initializer_range": 0.5, "tie_word_embeddings": False,
    }  # fmt: skip
    model = build_model(family("llama").architecture(config))
    policy, reference = (jax.jit(model.init)(jax.random.key(i)) for i in (0, 1))
    return evaluation.EvalModel(
        model, losses.build({"name": "dpo"}), {"policy": policy, "reference": reference}, np.zeros(1), 64, 16
    )


@pytest.mark.slow
def test_kl_of_samples_estimates_the_exact_one(judge):
    """Responses of at most two tokens can be counted out: KL is a sum over all of them."""
    prompt = np.array([1, 2], np.int32)
    ends = [(EOS,)] + [r for r in itertools.product(range(VOCAB), repeat=2) if r[0] != EOS]
    table = Table.of(Tokens(prompt, (np.array(r, np.int32),)) for r in ends)
    policy, reference = (evaluation.table_logps(judge, who, table)[:, 0, 0] for who in ("policy", "reference"))
    assert np.exp(policy).sum() == pytest.approx(1, abs=1e-5)
    exact = float((np.exp(policy) * (policy - reference)).sum())
    prompts = [prompt] * 1500
    drawn = evaluation.complete_prompts(judge, prompts, max_new_tokens=2, eos_id=EOS, seed=0)["policy"]
    estimate = evaluation.mean_with_interval(evaluation.policy_kl(judge, prompts, drawn))
    assert exact > 0.3
    assert estimate["low"] - 0.02 < exact < estimate["high"] + 0.02
    assert estimate["high"] - estimate["low"] < 0.5 * exact


def test_metrics_of_held_out_data_are_those_of_the_loss(judge):
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(0, VOCAB - 1, n).astype(np.int32)  # noqa: E731 - shortest here
    table = Table.of(Tokens(ids(3), (ids(2), ids(4))) for _ in range(70))  # more than a batch
    found = evaluation.evaluate_model(judge, table)
    margin = sum(s * evaluation.table_logps(judge, w, table)[..., 0] for s, w in ((1, "policy"), (-1, "reference"))) @ [
        1,
        -1,
    ]
    np.testing.assert_allclose(found["loss"], np.log1p(np.exp(-0.1 * margin)), atol=1e-5)
    summary = evaluation.summarize(found, table.weights)
    assert summary["eval_rewards/accuracies"]["mean"] == pytest.approx((margin > 0).mean())
    assert 0 < summary["eval_rewards/accuracies"]["low"] < summary["eval_rewards/accuracies"]["high"] < 1
    assert summary["eval_loss"]["high"] - summary["eval_loss"]["mean"] == pytest.approx(
        1.959964 * found["loss"].std(ddof=1) / math.sqrt(70), rel=1e-4
    )


def test_held_out_comparisons_count_by_their_weights():
    """A weight of 2 is the mean of two copies, one of 0 is a comparison that is not there."""
    nan = math.nan
    metrics = {
        "loss": np.array([1.0, 2.0, 9.0, 4.0]),
        "rewards/margins": np.array([1.0, -1.0, 5.0, nan]),
        "rewards/accuracies": np.array([1.0, 0.0, 1.0, nan]),
        "lengths/chosen": np.array([3.0, 1.0, 1.0, 4.0]),
        "lengths/rejected": np.array([1.0, 2.0, 9.0, nan]),
    }
    found = evaluation.summarize(metrics, np.array([2.0, 1.0, 0.0, 1.0], np.float32))
    assert found["eval_loss"]["mean"] == pytest.approx((2 * 1 + 2 + 4) / 4)
    assert found["eval_loss"]["n"] == 3
    assert found["eval_rewards/accuracies"]["mean"] == pytest.approx(2 / 3)
    # 3 squared over 4 + 1: as good as 9/5 comparisons of one weight, of which 6/5 are right
    assert found["eval_rewards/accuracies"]["low"] == pytest.approx(wilson(1.2, 1.8)[0])
    assert found["eval_length_bias"]["mean"] == pytest.approx(1.0)  # two points are on a line
    assert found["eval_length_bias"]["n"] == 2
    equal = evaluation.summarize(metrics, np.full(4, 7.0, np.float32))
    assert equal["eval_rewards/accuracies"]["high"] == pytest.approx(wilson(2, 3)[1])


def test_the_margin_of_single_responses_is_that_of_their_means():
    nan = math.nan
    metrics = {
        "loss": np.array([1.0, 1.0, 1.0, 1.0]),
        "rewards/chosen": np.array([1.0, 3.0, nan, nan]),
        "rewards/rejected": np.array([nan, nan, -2.0, 0.0]),
        "rewards/margins": np.full(4, nan),
        "rewards/accuracies": np.full(4, nan),
    }
    found = evaluation.summarize(metrics, np.ones(4, np.float32))["eval_rewards/margins"]
    half = 1.959964 * math.sqrt(2 / 2 + 2 / 2)  # both have a variance of 2 and two values
    assert found == pytest.approx({"mean": 3.0, "low": 3 - half, "high": 3 + half, "n": 4}, rel=1e-5)


def test_distinct_prompts():
    rows = [Tokens(np.array(p, np.int32), (np.array([1], np.int32),)) for p in ([1], [2, 3], [1], [3], [4])]
    assert [p.tolist() for p in evaluation.distinct_prompts(Table.of(rows), 3)] == [[1], [2, 3], [3]]


def test_per_token_log_probs_sum_to_those_of_responses(judge):
    rng = np.random.default_rng(1)
    ids = lambda n: rng.integers(0, VOCAB - 1, n).astype(np.int32)  # noqa: E731 - shortest here
    table = Table.of(Tokens(ids(2), (ids(1 + i % 5), ids(3))) for i in range(70))  # more than a batch
    sums = {who: evaluation.table_logps(judge, who, table) for who in judge.params}
    for i, (tokens, found) in enumerate(evaluation.token_logps_per_example(judge, table)):
        assert tokens.prompt.tolist() == table[i].prompt.tolist()
        for who, responses in found.items():
            assert [len(r) for r in responses] == [1 + i % 5, 3]
            np.testing.assert_allclose([r.sum() for r in responses], sums[who][i, :, 0], rtol=1e-5)
            short = min(1 + i % 5, 3)  # the shared part: in their order, from the first on
            np.testing.assert_allclose([r[:short].sum() for r in responses], sums[who][i, :, 1], rtol=1e-5)
    assert i == 69
