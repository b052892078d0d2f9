"""Sampling with kernels in 8 bits: how far the distribution moves, and where it is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import shared_model

from dpo_jax import sharding
from dpo_jax.errors import UserError
from dpo_jax.models.attention import capped
from dpo_jax.models.huggingface.folder import load_folder, load_tokenizer
from dpo_jax.models.model import build_model
from dpo_jax.sampling import generate, run
from dpo_jax.sampling.decode import AS_THEY_ARE, Draw, add_tokens, decode_weights, first_token
from dpo_jax.sampling.quantize import dequantize_layer, quantize_layer
from dpo_jax.sampling.slots import pad_prompts


def greedy(model, layers, params, prompts):
    """Returns 40 tokens of each prompt, which is read with `layers` and continued with `params`."""
    sampler, draw = run.sampler_of(model, 40, 0.0, ()), Draw.of(0.0, None, None)
    weights, whole = decode_weights(sampler, params, params, 0.0), jax.tree.map(jnp.asarray, layers)
    rows = (*pad_prompts(prompts, len(prompts)), jnp.arange(len(prompts))[:, None])
    begun = first_token(sampler, 40, AS_THEY_ARE, (whole, weights), rows, (jax.random.key(0), draw))
    add = jax.jit(lambda *args: add_tokens(sampler, AS_THEY_ARE, *args))
    return add(weights, begun, (draw, 40, (0, 1))).out.tolist()


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.slow
def test_kernels_in_8_bits_sample_from_almost_the_same_distribution(compute):
    """A trained model: the texts are those of the rounded kernels, whose KL is 0.0003 where the entropy is 2.6."""
    folder = shared_model("tinystories-656k")
    architecture, _, params = load_folder(folder)
    params = jax.tree.map(jnp.asarray, params)
    model, tokenizer = build_model(architecture, compute=compute), load_tokenizer(folder)
    prompts = [np.array(tokenizer.encode(text)) for text in ("Once upon a time", "The dog ran to the big tree and")]
    layers = range(architecture.layers)
    each = [jax.jit(quantize_layer)(jax.tree.map(lambda x, i=i: x[i], params["layers"])) for i in layers]
    rounded = jax.tree.map(lambda *x: jnp.stack(x), *(dequantize_layer(layer, jnp.float32) for layer in each))
    short = generate(model, params, prompts, max_new_tokens=40, eos_id=(), temperature=0, weights="int8")
    if compute == "float32":
        assert [x.tolist() for x in short] == greedy(model, params["layers"], {**params, "layers": rounded}, prompts)
    tokens = np.concatenate([prompts[0], generate(model, params, prompts[:1], max_new_tokens=100, eos_id=())[0]])[None]
    one, places = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
    logits = [
        capped(model.hidden(p, tokens, places, one, 0 * one)[0] @ model.head(p).T, architecture.logit_cap)
        for p in (params, {**params, "layers": rounded})
    ]
    whole, eight = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in logits)
    kl = (jnp.exp(whole) * (whole - eight)).sum(-1)
    assert 0 < kl.mean() < 1e-3


def test_kernels_in_8_bits_are_refused_where_they_do_not_apply():
    architecture, _, params = load_folder(shared_model("tinystories-656k"))
    model, params = build_model(architecture), jax.tree.map(jnp.asarray, params)
    mesh = sharding.make_mesh(1, 2, devices=jax.devices()[:2])
    laid = jax.device_put(params, sharding.param_shardings(mesh, model.axes, params))
    quantized = {**params, "layers": {**params["layers"], "q": {"quantized": 0, "scale": 0}}}
    for weights, given, message in (
        ("int4", params, "weights: 'int4' is not known"),
        ("int8", laid, "for devices that have all parameters"),
        ("int8", quantized, "quantized already"),
        ("int8", {"layers": {"router": {}}}, "not for mixtures of experts"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, given, [[3, 4]], eos_id=(), weights=weights)
