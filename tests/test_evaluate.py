"""Evaluation: the KL of a policy from its reference against the sum over all responses, and intervals."""

import json
import logging
import math
from types import SimpleNamespace

import enumerable
import jax
import numpy as np
import pytest

from dpo_jax import evaluation, losses
from dpo_jax.config.schema import Config, SamplesConfig
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.intervals import interval_text, wilson
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.sampling import generate
from dpo_jax.training import completions, run, setup

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


@pytest.fixture(scope="module")
def far():
    """A policy that has moved from its reference, samples of it, and the exact KL, averaged over the prompts."""
    model, ref = enumerable.world()
    keys = iter(jax.random.split(jax.random.key(5), len(jax.tree.leaves(ref))))
    policy = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), ref)
    models = evaluation.EvalModel(
        model, losses.build({"name": "dpo"}), {"policy": policy, "reference": ref}, np.zeros(1), 512, 16
    )
    prompts = enumerable.PROMPTS * 2000
    drawn = generate(model, policy, prompts, max_new_tokens=enumerable.LONGEST, eos_id=enumerable.EOS, batch_size=512)
    ratios = evaluation.policy_kl(models, prompts, drawn)
    exact = enumerable.exact(policy), enumerable.exact(ref)
    return ratios, enumerable.kl(*exact), enumerable.kl(*exact[::-1])


@pytest.mark.slow
def test_kl_of_samples_is_unbiased(far):
    ratios, exact, reverse = far
    error = ratios.std(ddof=1) / math.sqrt(len(ratios))
    assert abs(ratios.mean() - exact) < 3 * error
    assert exact > 20 * error  # so that a bias would be seen
    assert abs(exact - reverse) > 10 * error  # and the KL in the other direction


@pytest.mark.slow
def test_the_interval_of_kl_covers_it_as_often_as_it_says(far):
    """Of 100 intervals, each of 40 prompts, 95 are expected to; fewer than 88 have a probability of 0.002."""
    ratios, exact, _ = far
    found = [evaluation.mean_with_interval(part) for part in ratios.reshape(100, 40)]
    assert 88 <= sum(one["low"] < exact < one["high"] for one in found) <= 99
    assert {one["n"] for one in found} == {40}


@pytest.mark.parametrize(
    ("loss", "samples", "count"),
    [
        ("dpo", {}, 64),
        ("dpo", {"prompts": 0}, 0),
        ("dpo", {"prompts": 0, "kl_prompts": 5}, 5),
        ("dpo", {"kl_prompts": 0}, 0),
        ("sft", {}, 0),
        ("simpo", {"kl_prompts": 0}, 0),
        ("bradley_terry", {}, 0),
        ("simpo", {"kl_prompts": 5}, "this loss has no reference"),
        ("dpo", {"kl_prompts": -1}, "kl_prompts must be >= 0"),
    ],
)
def test_runs_with_a_reference_sample_for_kl(loss, samples, count):
    config = Config(loss={"name": loss}, samples=SamplesConfig(**samples))
    if isinstance(count, int):
        assert run.kl_prompt_count(config, losses.build(config.loss)) == count
    else:
        with pytest.raises(UserError, match=count):
            setup.check_config(config)


def test_prompts_without_room_for_a_completion_are_left_out_and_counted(caplog):
    caplog.set_level(logging.INFO, "dpo_jax")
    model, _ = enumerable.world()
    prompts = [np.arange(1, n, dtype=np.int32) for n in (4, 12, 9)]
    table = Table.of(Tokens(p, (np.array([1], np.int32),)) for p in (*prompts, prompts[0]))
    config = Config(samples=SamplesConfig(prompts=2, max_new_tokens=8))  # of 16 positions
    shown, own = completions.prompts_to_sample(config, SimpleNamespace(model=model), losses.build("dpo"), table)
    assert [len(p) for p in shown] == [3, 11]
    assert [len(p) for p in own] == [3, 8]
    assert "KL: 1 of 3 prompts are left out" in caplog.text


@pytest.mark.parametrize(("options", "calls"), [({}, 1), ({"temperature": 0.5}, 2), ({"top_k": 3}, 2)])
def test_samples_to_show_are_drawn_anew_if_they_are_not_of_the_policy_itself(monkeypatch, options, calls):
    seen = []

    def generate(model, params, *, prompts, **given):
        seen.append({k: given[k] for k in ("temperature", "top_k", "top_p")} | {"n": len(prompts)})
        return [np.array([len(seen), i]) for i in range(len(prompts))]

    monkeypatch.setattr(completions, "generate", generate)
    monkeypatch.setattr(completions, "decode_texts", lambda tokenizer, ids, ends: [row.tolist() for row in ids])
    loaded = SimpleNamespace(model=None, end_ids=lambda tokenizer: (EOS,))
    config = Config(samples=SamplesConfig(**options))
    prompts = [np.array([i]) for i in range(5)]
    found = completions.make_run_completer(config, loaded, None, prompts[:2], prompts)(None)
    assert seen[0] == {"temperature": 1.0, "top_k": None, "top_p": None, "n": 5}
    assert seen[1:] == [seen[0] | options | {"n": 2}] * (calls - 1)
    assert [row.tolist() for row in found.ids] == [[1, i] for i in range(5)]
    assert found.texts == [[calls, 0], [calls, 1]]


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


def test_a_single_value_has_no_interval():
    one = {"loss": np.array([2.0]), "rewards/chosen": np.array([1.0]), "rewards/rejected": np.array([-0.5])}
    found = evaluation.summarize(one, np.ones(1, np.float32))
    assert found["eval_loss"] == {"mean": 2.0, "n": 1}
    assert found["eval_rewards/margins"] == {"mean": 1.5, "n": 2}
    assert "Infinity" not in json.dumps(found)
    assert [interval_text(found["eval_loss"]), interval_text({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 9}, 2)] == [
        "unknown",
        "0.25 .. 0.75",
    ]


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
