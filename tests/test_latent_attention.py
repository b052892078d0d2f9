"""Multi-head latent attention: its scale, cache, shards and work. Parity with transformers is in test_models.py."""

import jax
import jax.numpy as jnp
import pytest
from known_models import KNOWN
from tiny import _ARGUMENTS, VOCAB

from dpo_jax import sharding
from dpo_jax.models import lora
from dpo_jax.models.decoder_layer import scoring_of
from dpo_jax.models.families.registry import architecture_of, family
from dpo_jax.models.model import build_model
from dpo_jax.training.roofline import latent_weights, matmul_weights, mixed_numbers

TINY = {"vocab_size": VOCAB, **_ARGUMENTS["deepseek_v3"]}


def shapes_of(architecture):
    return jax.eval_shape(build_model(architecture).init, jax.eval_shape(jax.random.key, 0))


def test_yarn_scales_scores_and_leaves_angles_as_long():
    """DeepSeek-V3: factor 40, both scales 1; (0.1 ln 40 + 1)^2 / sqrt(192). A rotary factor of 1 is no stretch."""
    a = architecture_of(KNOWN["DeepSeek-V3"][0])
    assert scoring_of(a).scale == pytest.approx(0.13523379, rel=1e-6)
    assert (a.rope.dims, a.rope.amplitude, a.max_positions) == (64, 1.0, 163840)
    plain = architecture_of(KNOWN["Moonlight-16B-A3B"][0])
    assert scoring_of(plain).scale == 192**-0.5
    near = family("deepseek_v3").architecture(
        TINY | {"rope_parameters": TINY["rope_parameters"] | {"factor": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0}}
    )
    assert scoring_of(near).scale == 20**-0.5


@pytest.mark.parametrize(("values", "wide"), [(16, 20), (24, 24)])
@pytest.mark.slow
def test_the_cache_has_keys_and_values_of_all_heads(values, wide):
    """Of a head dimension of 20 and values of 16 or 24: the shorter ones end in zeros."""
    a = family("deepseek_v3").architecture(TINY | {"v_head_dim": values})
    model, ids = build_model(a), jnp.ones((2, 5), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0))
    _, cache = model.prefill(params, ids, jnp.broadcast_to(jnp.arange(5), (2, 5)), ids, 3, 4)
    keys, found, own_keys, own_values = cache[0]
    assert keys.shape == found.shape == (2, 4, 5, wide)
    assert own_keys.shape == own_values.shape == (6, 4, 4, wide)
    shorter, size = (found, values) if values < wide else (keys, 20)
    assert not shorter[..., size:].any()
    assert shorter[..., size - 1].all()


def test_the_short_vectors_are_sharded_as_the_residual():
    model = build_model(family("deepseek_v3").architecture(TINY))
    mesh = sharding.make_mesh(1, 2, 2, devices=jax.devices()[:4])
    where = sharding.param_shardings(mesh, model.axes, shapes_of(model.architecture))["layers"]
    shards = sharding.param_shardings(mesh, {"x": ("embed",)}, {"x": jax.ShapeDtypeStruct((4,), "float32")})["x"].spec[
        0
    ]
    heads = sharding.param_shardings(mesh, {"x": ("heads",)}, {"x": jax.ShapeDtypeStruct((4,), "float32")})["x"].spec[0]
    for name in ("q", "k", "v"):
        assert tuple(where[name]["kernel"].spec) == (None, shards, heads, None)
    assert tuple(where["kv_down"]["kernel"].spec) == (None, shards, None)
    assert tuple(where["q_down_norm"]["scale"].spec) == (None, shards)
    assert tuple(where["o"]["kernel"].spec) == (None, heads, None, shards)


def test_adapters_are_of_the_modules_of_transformers():
    a = family("deepseek_v3").architecture(TINY)
    names = {name.rpartition(".")[2] for name in lora.adapted_modules(a, (lora.ALL,))}
    assert names == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    adapters = lora.init_adapters(a, lora.Lora(2, 2.0, ("kv_a_proj_with_mqa", "kv_b_proj")), 0)["layers"]
    assert {name: leaves["lora_b"].shape for name, leaves in adapters.items()} == {
        "kv_down_k_rotary": (3, 2, 26),
        "k_v": (3, 2, 4, 28),
    }


def test_the_work_of_a_step_counts_latents():
    """All parameters but norms, corrections and the embedding; by hand for one layer."""
    for name, norms in (("DeepSeek-V3", 61 * (1536 + 512) + 58 * 256), ("Moonlight-16B-A3B", 27 * 512 + 26 * 64)):
        config, count = KNOWN[name]
        a = architecture_of(config)
        norms += (2 * a.layers + 1) * a.width
        assert matmul_weights(a, a.mixture.experts) + 2 * a.vocab * a.width + norms == count
    a = family("deepseek_v3").architecture(TINY)
    assert latent_weights(a) == 32 * 24 + 24 * 4 * 20 + 32 * 26 + 18 * 4 * 28 + 4 * 16 * 32
    assert mixed_numbers(a) == 3 * (4 * 20 + 4 * 12 + 8 + 2 * 4 * 16)
