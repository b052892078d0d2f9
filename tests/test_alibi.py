"""ALiBi as further dimensions of queries and keys: the slopes, the biases, and attention with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import launched
import numpy as np
import pytest
from test_attention import D, inputs, layout, visible
from test_families import CONFIGS

from dpo_jax.models.alibi import bias_dims, key_biases, slopes, with_biases
from dpo_jax.models.attention import Scoring, packed_attention
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.sampling import checks

BLOOM = architecture_of({**CONFIGS["bloom"], "model_type": "bloom"})
FALCON = dataclasses.replace(BLOOM, alibi="scaled")


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (16, [h / 2 for h in range(1, 17)]),
        (3, [4, 8, 2]),  # of two heads, then of four
        (6, [2, 4, 6, 8, 1, 3]),
        (7, [2, 4, 6, 8, 1, 3, 5]),
    ],
)
def test_slopes_are_the_papers(heads, exponents):
    """Section 3: a geometric sequence from 2 ** (-8 / H); between powers of two as in its authors' code."""
    np.testing.assert_allclose(slopes(heads), np.exp2(-np.array(exponents, np.float64)), rtol=1e-7)


def test_biases_are_slopes_times_positions_before_the_scale():
    positions = jnp.array([[0, 1, 5], [3, 4, 1000]])
    found = key_biases(BLOOM, positions, 0.25, "float32")
    expected = np.asarray(positions)[..., None] * np.array([2**-2, 2**-4, 2**-6, 2**-8]) / 0.25
    np.testing.assert_array_equal(found.sum(-1), expected)


def test_falcons_are_rounded_to_bfloat16_before_and_after_the_product_and_not_divided():
    """Position 1001 is 1000 in bfloat16, which has 8 bits, and powers of two keep it."""
    four = key_biases(FALCON, jnp.array([[1001]]), 0.25, "float32")
    np.testing.assert_array_equal(four[0, 0].sum(-1), 1000 * np.array([2**-2, 2**-4, 2**-6, 2**-8]))
    sixteen = dataclasses.replace(FALCON, heads=16, kv_heads=16)
    # 2 ** -0.5 is 181 / 256 in 8 bits; 67 of them are 189.48 quarters, but 67 / 2 ** 0.5 would be 189.505 of them.
    assert float(key_biases(sixteen, jnp.array([[67]]), 0.25, "float32")[0, 0, 0].sum()) == 189 / 4


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_matmuls_that_round_to_bfloat16_keep_the_precision_of_float32(compute):
    """As a TPU reads numbers in float32: every part is a number of bfloat16, and their sum is slope * position."""
    positions, model = jnp.arange(0, 4096, 7)[None], dataclasses.replace(BLOOM, heads=6)
    exact = np.asarray(positions, np.float64)[..., None] * slopes(6).astype(np.float64) / 0.3
    found = jax.jit(lambda: key_biases(model, positions, 0.3, compute))()
    assert found.dtype == compute
    assert found.shape[-1] == bias_dims(model)
    np.testing.assert_array_equal(found.astype(jnp.bfloat16).astype(jnp.float32), found.astype(jnp.float32))
    np.testing.assert_allclose(found.astype(jnp.float32).sum(-1), exact, rtol=2**-21)


def test_attention_falls_with_the_distance():
    """Against dense attention with slope * (key position - query position) added, over prompts with responses."""
    rows, (q, k, v, _) = layout(9), inputs()
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    model, place = dataclasses.replace(BLOOM, heads=q.shape[2]), rows.queries.positions
    far = jnp.asarray(place[:, None, :] - place[:, :, None], jnp.float32)[:, None]

    def dense(slope):
        scores = 0.4 * jnp.einsum("rqhd,rkhd->rhqk", q, k) + slope[:, None, None] * far
        p = jax.nn.softmax(jnp.where(visible(rows)[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("rhqk,rkhd->rqhd", p, v)

    biased = with_biases(q, k, v, key_biases(model, place, 0.4, "float32"))
    ours = packed_attention(*biased, rows, Scoring(0.4))[..., :D]
    np.testing.assert_allclose(ours, dense(slopes(model.heads)), atol=2e-5)
    assert float(jnp.abs(ours - dense(np.zeros(model.heads))).max()) > 0.1


def test_a_text_may_be_longer_than_any_of_pretraining():
    """There is no table of positions that would end."""
    model = dataclasses.replace(BLOOM, max_positions=8)
    checks.check_sampling(model, [list(range(3, 9))], 1, 5, 1.0, None, None)


@pytest.mark.slow
def test_one_trajectory_over_tensor_and_sequence(tmp_path, monkeypatch):
    """Devices that share the heads, whose slopes differ, and devices that share the tokens, whose positions do."""
    folder = launched.make_world(tmp_path)
    config = json.loads((launched.ROOT / "configs/models/synthetic.json").read_text())
    own = {"model_type": "bloom", "hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": config["vocab_size"]}
    (folder / "tiny.json").write_text(json.dumps({**own, "initializer_range": 0.1}))
    brief = ["--max_steps", "4", "--samples.prompts", "0", "--samples.kl_prompts", "0"]
    launched.export_start(monkeypatch, folder, "start", *brief)
    launched.train_here(monkeypatch, folder, "one", *brief)
    launched.train_here(monkeypatch, folder, "more", *brief, "--mesh.tensor", "2", "--mesh.sequence", "2", devices=4)
    launched.assert_one_trajectory(folder, "more", steps=4, left=None)
    launched.assert_same_weights(folder, "more", "one", "start")
