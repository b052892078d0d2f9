"""The gated delta rule, paths in packed rows, unlike layers. Parity with transformers is in test_models.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.errors import UserError
from dpo_jax.models import groups
from dpo_jax.models.architecture import Delta
from dpo_jax.models.delta import DeltaInputs, ancestors, delta_step, packed_delta, paths_of, unit_inverse
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.sharding import make_mesh
from dpo_jax.training.attention_check import refuse_split
from dpo_jax.training.roofline import matmul_weights, state_work

# Lengths of a comparison's prompt and responses: forks within chunks of 64 tokens, at their ends, and chunks later.
ROWS = (
    ((70, 30, 40), (3, 2, 1, 5), (1, 100, 2)),
    ((5, 70, 80, 20), (64, 64, 10)),
    ((20,) * 4, (10, 20, 30), (1, 1, 1), (90, 5)),
    ((64, 1, 63), (128, 2)),
)
LENGTH = 330


def ids_of(rows, length):
    """Returns the ids of rows of comparisons, with padding at their ends."""
    ids = np.zeros((2, len(rows), length), np.int32)
    for r, comparisons in enumerate(rows):
        spans = [(i + 1, j, n) for i, lengths in enumerate(comparisons) for j, n in enumerate(lengths)]
        row = [[value] * n for *values, n in spans for value in [values]]
        flat = np.array([value for part in row for value in part]).T
        ids[:, r, : flat.shape[1]] = flat
    return tuple(jnp.asarray(ids))


def inputs_of(ids, seed=0, heads=2, key=8, value=4):
    rng, shape = np.random.default_rng(seed), (*ids[0].shape, heads)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, *shape, key)))
    x = q * key**-0.5, k, rng.normal(size=(*shape, value)), -0.1 * rng.random(shape), rng.random(shape)
    return DeltaInputs(*(jnp.asarray(y, jnp.float32) for y in x))


@jax.jit
def run(x, ids):
    return packed_delta(x, paths_of(*ids, 4))


def token_by_token(x, parents):
    """Returns what tokens read, and the states of the last ones: the equation of delta.py in float64, with loops."""
    q, k, v, g, b = (np.asarray(y, np.float64) for y in x)
    rows, length, heads, key = q.shape
    states, read = np.zeros((rows, length + 1, heads, key, v.shape[-1])), np.zeros(v.shape)
    for r, t, h in np.ndindex(rows, length, heads):
        state = np.exp(g[r, t, h]) * states[r, parents[r, t], h]
        error = v[r, t, h] - state.T @ k[r, t, h]
        states[r, t, h] = state + b[r, t, h] * np.outer(k[r, t, h], error)
        read[r, t, h] = states[r, t, h].T @ q[r, t, h]
    return read, states[:, length - 1]


def test_ancestors_by_hand():
    """Two comparisons: a prompt of 3 tokens with responses of 2 and 1, then a prompt of 1 with a response of 2."""
    ids = ids_of((((3, 2, 1), (1, 2)),), 10)
    table = [[10, 10], [10, 0], [0, 1], [1, 2], [2, 3], [1, 2], [10, 10], [10, 6], [6, 7], [10, 10]]
    assert ancestors(*ids, 2)[0].tolist() == table


def test_packed_rows_are_the_rule_token_by_token():
    """With forks in chunks, at their ends and chunks later; the state after a row is that of its last token."""
    ids = ids_of(ROWS, LENGTH)
    x, parents = inputs_of(ids), np.asarray(ancestors(*ids, 1))[..., 0]
    read, state = run(x, ids)
    read64, state64 = token_by_token(x, parents)
    np.testing.assert_allclose(read, read64, atol=1e-6)
    np.testing.assert_allclose(state, state64, atol=1e-6)


def test_equal_keys_written_at_full_rate_are_replaced():
    """Each token replaces what the one before it wrote: it reads its own value. The system is then the worst one."""
    ids = ids_of((((130, 20),),), 150)
    x = inputs_of(ids, key=4)
    k = jnp.full_like(x.k, 0.5)
    x = x._replace(q=k, k=k, g=jnp.zeros_like(x.g), b=jnp.ones_like(x.b))
    np.testing.assert_allclose(run(x, ids)[0], x.v, atol=3e-6)


def test_a_step_continues_the_state_of_a_row():
    ids = ids_of((((70,),),), 70)
    x = inputs_of(ids)
    read, state = run(x, ids)
    before = jax.tree.map(lambda y: y[:, :69], x)
    _, old = run(before, ids_of((((69,),),), 69))
    one, new = delta_step(old, jax.tree.map(lambda y: y[:, 69], x))
    np.testing.assert_allclose(one, read[:, 69], atol=1e-6)
    np.testing.assert_allclose(new, state, atol=1e-6)


def test_an_inverse_and_its_gradient_are_numpys():
    rng = np.random.default_rng(0)
    a, g = np.tril(rng.normal(size=(3, 8, 8)) * 0.5, -1), rng.normal(size=(3, 8, 8))
    inverse, back = jax.vjp(unit_inverse, jnp.asarray(a, jnp.float32))
    exact = np.linalg.inv(np.eye(8) + a)
    np.testing.assert_allclose(inverse, exact, atol=1e-5)
    slope = -exact.swapaxes(1, 2) @ g @ exact.swapaxes(1, 2)
    np.testing.assert_allclose(back(jnp.asarray(g, jnp.float32))[0], slope, rtol=1e-4, atol=1e-4)


def test_groups_are_the_shortest_pattern():
    linear, full = "delta", "attention"
    assert groups.period((linear, linear, full) * 4) == 3
    assert groups.period((linear,) * 5) == 1
    assert groups.period((full, linear, full)) == 3
    stacks = {"q": np.arange(2), "delta_q": np.arange(4), "up": np.arange(6)}
    kinds = (linear, full, linear) * 2
    assert groups.layer_of(kinds, stacks, 4) == {"q": 1, "up": 4}
    assert groups.layer_of(kinds, stacks, 3) == {"delta_q": 2, "up": 3}


def test_a_mesh_that_splits_rows_is_refused():
    a = family("qwen3_next").architecture(CONFIG)
    refuse_split(a, make_mesh(4))
    with pytest.raises(UserError, match=r"^mesh.sequence: a qwen3_next has linear attention, whose state goes from to"):
        refuse_split(a, make_mesh(2, sequence=2))


CONFIG = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "head_dim": 16}
CONFIG |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "linear_num_key_heads": 2}
CONFIG |= {"shared_expert_intermediate_size": 12, "linear_num_value_heads": 4, "linear_key_head_dim": 6}
CONFIG |= {"linear_value_head_dim": 10, "num_key_value_heads": 2}


def test_the_work_of_a_step_counts_both_kinds_of_layers():
    """By hand: three layers of linear attention, one of attention with a gate, four mixtures with a shared expert."""
    a = family("qwen3_next").architecture(CONFIG)
    assert a.delta == Delta(2, 4, 6, 10, 4)
    linear = 32 * (2 * 2 * 6 + 2 * 4 * 10 + 2 * 4) + 4 * 10 * 32
    attention = 32 * (2 * 4 + 2 * 2) * 16 + 4 * 16 * 32
    mlp = 32 * (4 + 1) + 3 * 32 * (2 * 8 + 12)
    assert matmul_weights(a) == 3 * linear + attention + 4 * mlp
    assert state_work(a) == 6 * 3 * 4 * 6 * 10


@pytest.mark.slow
def test_the_program_of_unlike_layers_is_that_of_one_group(monkeypatch):
    """That of 48 layers is as long as that of 8; unrolled, that of 16 is over three times as long."""

    def length(layers):
        a = family("qwen3_next").architecture(CONFIG | {"num_hidden_layers": layers})
        model, row = build_model(a, remat="dots"), jax.ShapeDtypeStruct((2, 256), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
        lowered = jax.jit(jax.grad(lambda p, *rows: model.hidden(p, *rows).sum())).lower(shapes, *[row] * 4)
        return lowered.as_text().count("\n")

    one = length(8)
    assert length(48) == one
    monkeypatch.setattr(groups, "period", len)
    assert length(16) > 3 * one


@pytest.mark.slow
def test_new_parameters_are_drawn_as_in_transformers():
    """Decays of 0.01 to 16, shifts of 1, norms stored minus 1 but the gated one, and layers that differ."""
    a = family("qwen3_next").architecture(CONFIG | {"num_hidden_layers": 8, "initializer_range": 0.5})
    layers = jax.jit(build_model(a).init)(jax.random.key(0))["layers"]
    log = layers["delta_rates"]["log"]
    assert log.shape == (6, 4)
    assert np.log(0.01) <= log.min() < log.max() <= np.log(16.0)
    assert (layers["delta_rates"]["shift"] == 1).all()
    assert (layers["delta_norm"]["scale"] == 1).all()
    assert layers["q_norm"]["scale"].shape == (2, 16)
    assert not layers["q_norm"]["scale"].any()
    assert layers["delta_conv_v"]["weight"].shape == (6, 40, 4)
    for name in ("delta_q", "delta_o", "q_gate", "shared_up", "shared_weight"):
        assert layers[name]["kernel"].std() == pytest.approx(0.5, rel=0.15)
        assert not np.array_equal(*layers[name]["kernel"][:2])
