"""The world of `dpo-jax frontier`: estimates against exact sums, sampled pairs, one program per method."""

import jax
import numpy as np
import pytest

from dpo_jax import sharding
from dpo_jax.config.commands import FrontierConfig
from dpo_jax.data.sources import synthetic
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.experiments import frontier, offline
from dpo_jax.experiments.reward_model import centered
from dpo_jax.experiments.world import (
    World,
    enumerate_responses,
    enumerate_rewards,
    make_measurer,
    make_table_logps,
    sample_completions,
    sample_pairs,
    score_completions,
    table_layout,
)
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.rewards.registry import get_reward
from dpo_jax.training.abstract import microbatch_tokens
from dpo_jax.training.metrics_file import read_metrics

TOKENIZER = synthetic.synthetic_tokenizer()
CONFIG = {
    "model_type": "llama", "vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "initializer_range": 0.5, "tie_word_embeddings": True,
}  # fmt: skip
MODEL = build_model(family("llama").architecture(CONFIG))
PROMPTS = [np.array(TOKENIZER(p)["input_ids"], np.int32) for p in synthetic.synthetic_prompts("test", 150)]


def params(seed):
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(seed)))


@pytest.fixture(scope="module")
def world():
    """A world of responses of one token, which can be enumerated."""
    start, mesh = params(0), sharding.make_mesh()
    shardings = sharding.param_shardings(mesh, MODEL.axes, start)
    reward = get_reward("synthetic")
    parts = (MODEL, mesh, shardings, start, sharding.put_params(start, shardings), TOKENIZER, reward, 1, 64, 0)
    return World(*parts, ends=(TOKENIZER.eos_token_id,))


def test_every_response_is_enumerated_once():
    """Two tokens besides EOS, at most 2 tokens: EOS alone, 2 responses with EOS and 4 cut ones."""
    found = enumerate_responses(3, (2,), 2)
    assert sorted(found) == sorted([(2,), (0, 2), (1, 2), (0, 0), (0, 1), (1, 0), (1, 1)])


@pytest.mark.slow
def test_reward_and_kl_equal_sums_over_all_responses(world):
    table_logps = make_table_logps(world)
    rewards, base = enumerate_rewards(world, PROMPTS, table_logps)
    np.testing.assert_allclose(np.exp(base).sum(1), 1, atol=1e-5)
    policy = sharding.put_params(params(1), world.shardings)
    _, logps = enumerate_rewards(world._replace(reference=policy), PROMPTS, table_logps)
    p = np.exp(logps)
    pairs = Table.of(Tokens(x, (np.array([5]), np.array([6]))) for x in PROMPTS[:4])
    measure = make_measurer(world, PROMPTS, pairs, table_layout(world, pairs), table_logps)
    point = measure(policy, "dpo", 0.1, 3)
    assert point[:3] == ("dpo", 0.1, 3)
    exact_kl = (p * (logps - base)).sum(1)
    exact_reward = (p * rewards).sum(1)
    # With one sample per prompt, the interval estimates the spread of the samples, which is known exactly.
    spread = np.sqrt((p * (logps - base - exact_kl[:, None]) ** 2).sum(1).mean() / len(PROMPTS))
    assert abs(point.kl - exact_kl.mean()) < 3 * spread
    assert point.kl_half == pytest.approx(1.96 * spread, rel=0.3)
    assert exact_kl.mean() > 10 * spread  # a KL in the wrong direction would be noticed
    spread = np.sqrt((p * (rewards - exact_reward[:, None]) ** 2).sum(1).mean() / len(PROMPTS))
    assert abs(point.reward - exact_reward.mean()) < 3 * spread
    assert point.reward_half == pytest.approx(1.96 * spread, rel=0.3)
    assert point.chosen == pytest.approx(logps[:4][:, [_index(5)]].mean(), abs=1e-4)
    assert point.rejected == pytest.approx(logps[:4][:, [_index(6)]].mean(), abs=1e-4)
    assert point.tokens == 1
    assert point.cut > 0.5


def _index(token):
    return enumerate_responses(len(TOKENIZER), (TOKENIZER.eos_token_id,), 1).index((token,))


@pytest.mark.slow
def test_the_reference_has_no_kl_from_itself(world):
    pairs = Table.of(Tokens(x, (np.array([5]), np.array([6]))) for x in PROMPTS[:4])
    layout, table_logps = table_layout(world, pairs), make_table_logps(world)
    point = make_measurer(world, PROMPTS[:20], pairs, layout, table_logps)(world.reference, "sft", 0.0, 0)
    assert (point.kl, point.kl_half) == (0, 0)


def test_a_centered_reward_has_mean_0_on_the_reference_and_the_same_differences(world):
    reward = lambda prompts, answers: np.array([len(answer) + 5.0 for answer in answers])  # noqa: E731
    prompts = PROMPTS[:64]
    found = centered(reward, world, prompts)
    scores = score_completions(world, found, prompts, sample_completions(world, world.reference, prompts))
    assert scores.std() > 0.5
    assert scores.mean() == pytest.approx(0.0, abs=1e-6)
    one, other = found(["", ""], ["abc", "a"])
    assert one - other == 2.0


def test_many_responses_are_not_enumerated(world):
    assert enumerate_rewards(world._replace(max_new_tokens=2), PROMPTS[:1], make_table_logps(world)) is None


def test_pairs_have_the_sampled_ids_and_are_read_again(world, tmp_path):
    path = tmp_path / "pairs.jsonl"
    table = sample_pairs(path, world, PROMPTS[:30], 4, "ranked", 0)
    rows = read_metrics(path)
    assert len(rows) == len(table) > 30
    for i, row in enumerate(rows):
        assert synthetic.synthetic_reward(row["prompt"], row["chosen"]) > synthetic.synthetic_reward(
            row["prompt"], row["rejected"]
        )
        ids = [part.tolist() for part in (table[i].prompt, *table[i].responses)]
        assert ids == row["ids"]
        assert TOKENIZER.decode(ids[1], skip_special_tokens=True) == row["chosen"]
    before = path.read_bytes()
    again = sample_pairs(path, world._replace(reward=None), PROMPTS[:30], 4, "ranked", 0)  # needs no reward
    assert path.read_bytes() == before
    np.testing.assert_array_equal(again.ids, table.ids)


@pytest.mark.parametrize("method", [pytest.param("dpo", marks=pytest.mark.slow), "unlikelihood"])
def test_all_strengths_of_a_method_are_one_program(world, method, tmp_path):
    """Runs with other strengths end with other parameters."""
    table = sample_pairs(tmp_path / "p.jsonl", world, PROMPTS[:30], 4, "ranked", 0)
    settings = FrontierConfig("synthetic", optim={"name": "rmsprop", "learning_rate": 1e-3}, max_steps=3, batch_size=8)
    build = lambda strength: frontier.job_config(settings, method, strength)  # noqa: E731
    ref_logps = make_table_logps(world)(world.reference, table, table_layout(world, table))
    program = offline.offline_program(world, build(0.1), table, ref_logps)
    ends = []
    for strength in (0.1, 1.0, 0.1):
        *_, (step, end) = offline.offline_steps(program, build(strength), 0)
        assert step == 3
        ends.append(jax.device_get(end))
    assert program.step._cache_size() == 1  # noqa: SLF001
    same = jax.tree.map(np.array_equal, ends[0], ends[2])
    other = jax.tree.map(np.array_equal, ends[0], ends[1])
    assert all(jax.tree.leaves(same))
    assert not all(jax.tree.leaves(other))


def test_a_microbatch_has_as_many_tokens_as_one_of_a_run(world):
    """1,024 on a CPU, as in `dpo-jax train`; a step of many tokens then keeps its arrays in the cores' caches."""
    response = np.full(60, 3, np.int32)
    layout = table_layout(world, Table.of(Tokens(PROMPTS[i % 9], (response, response)) for i in range(900)), 512)
    most = microbatch_tokens(jax.default_backend())
    assert layout.rows * layout.length <= most * sharding.row_devices(world.mesh)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path):
    table = sample_pairs(tmp_path / "p.jsonl", world, PROMPTS[:10], 4, "ranked", 0)
    optim = {"name": "rmsprop", "learning_rate": 1e30, "warmup_steps": 0}
    settings = FrontierConfig("synthetic", optim=optim, max_steps=4, batch_size=8)
    c = frontier.job_config(settings, "unlikelihood", 0.5)
    with pytest.raises(UserError, match="not finite at step 2"):
        list(offline.offline_steps(offline.offline_program(world, c, table, None), c, 0))
