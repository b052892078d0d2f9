"""What the backward pass saves, and the norms, which have a backward pass of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import folders_of, largest_difference, tokens_of, unpacked_rows

from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.layers import normalize
from dpo_jax.models.model import build_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return folders_of({"llama": ("llama", {})}, tmp_path_factory.mktemp)


@pytest.mark.slow
def test_remat_does_not_change_gradients(folders):
    architecture, _, params = load_folder(folders("llama"))
    rows = unpacked_rows(tokens_of(2, 40))
    grads = []
    for remat in ("none", "dots", "full"):
        model = build_model(architecture, remat=remat)
        grads.append(jax.jit(jax.grad(lambda p, m=model: jnp.sin(m.hidden(p, *rows)).sum()))(params))
    assert largest_difference(grads[1], grads[0]) < 1e-6
    assert largest_difference(grads[2], grads[0]) < 1e-6


def test_remat_saves_less_the_more_it_recomputes(folders):
    architecture, _, params = load_folder(folders("llama"))
    rows = unpacked_rows(tokens_of(4, 96))
    sizes = []
    for remat in ("none", "dots", "full"):
        model = build_model(architecture, remat=remat)
        back = jax.eval_shape(lambda p, m=model: jax.vjp(lambda q: m.hidden(q, *rows), p)[1], params)
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(back)))
    assert sizes[0] > sizes[1] > sizes[2]


def test_bfloat16_saves_half_for_the_backward_pass(folders):
    architecture, _, params = load_folder(folders("llama"))
    rows = unpacked_rows(tokens_of(4, 96))

    def saved(compute):
        model = build_model(architecture, compute=compute)
        back = jax.eval_shape(lambda p: jax.vjp(lambda q: model.hidden(q, *rows), p)[1], params)
        # Per layer, as a scan stacks them: not the parameters, whose shapes lack the tokens.
        stacked = [x for x in jax.tree.leaves(back) if x.shape[:3] == (architecture.layers, 4, 96)]
        assert len(stacked) > 8
        return stacked, sum(x.size * x.dtype.itemsize for x in stacked)

    (_, wide), (narrow, size) = saved("float32"), saved("bfloat16")
    assert size == wide / 2
    # XLA would convert a stack of bfloat16 to float32 before it slices a layer out of it on a CPU.
    assert {x.dtype for x in narrow} == {jnp.dtype("uint16")}


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=["features", "heads"])
def test_a_norm_has_the_gradient_of_its_equation(kind, shape):
    draw = np.random.default_rng(0)
    x, g = (jnp.asarray(draw.normal(2, 3, (2, 5, *shape)), jnp.float32) for _ in range(2))
    scale, bias = (jnp.asarray(draw.normal(1, 1, shape), jnp.float32) for _ in range(2))

    def equation(x, scale, bias):
        axes = tuple(range(-len(shape), 0))
        y = x - x.mean(axes, keepdims=True) if kind == "layer" else x
        y = y / jnp.sqrt((y**2).mean(axes, keepdims=True) + 0.1) * scale
        return jnp.vdot(y + bias, g) if kind == "layer" else jnp.vdot(y, g)

    def ours(x, scale, bias):
        return jnp.vdot(normalize(x, scale, bias if kind == "layer" else None, kind, 0.1), g)

    for found, expected in zip(*(jax.grad(f, (0, 1, 2))(x, scale, bias) for f in (ours, equation)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
