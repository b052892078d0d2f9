"""Optimizers against torch's, step by step."""

import jax
import numpy as np
import optax
import pytest
import torch

from dpo_jax import optim
from dpo_jax.errors import UserError


def torch_trajectory(kind, grads, start, rate, warmup, max_norm, **options):
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = kind([parameter], lr=rate, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / (warmup + 1)))
    path = []
    for g in grads:
        parameter.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        optimizer.step()
        schedule.step()
        path.append(parameter.detach().numpy().copy())
    return np.array(path)


def trajectory(tx, grads, start):
    params, state, path = start, tx.init(start), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params))
    return np.array(path)


@pytest.mark.parametrize("scale", [100.0, 1.0, 1e-4])
@pytest.mark.parametrize(
    ("name", "kind", "options", "torch_options"),
    [
        ("rmsprop", torch.optim.RMSprop, {}, {}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.1}, {"weight_decay": 0.1}),
    ],
)
def test_is_torchs_with_warm_up_and_clipping(name, kind, options, torch_options, scale):
    rng = np.random.default_rng(0)
    start = rng.normal(size=7).astype(np.float32)
    grads = (scale * rng.normal(size=(20, 7))).astype(np.float32)
    tx = optim.build(name, learning_rate=1e-2, warmup_steps=5, max_grad_norm=10.0, **options)
    expected = torch_trajectory(kind, grads, start, 1e-2, 5, 10.0, **torch_options)
    np.testing.assert_allclose(trajectory(tx, grads, start), expected, atol=1e-6)


def test_warm_up_is_the_originals():
    rate = optim.linear_warmup(1e-6, 150)
    assert float(rate(0)) == pytest.approx(1e-6 / 151)
    assert float(rate(149)) == pytest.approx(1e-6 * 150 / 151)
    assert float(rate(150)) == pytest.approx(1e-6)
    assert float(rate(10_000)) == pytest.approx(1e-6)


def test_defaults_are_the_papers():
    tx = optim.build("rmsprop")
    grad = {"w": np.float32(2.0)}
    updates, _ = jax.jit(tx.update)(grad, tx.init(grad))
    assert float(updates["w"]) == pytest.approx(-1e-6 / 151 / np.sqrt(0.01), rel=1e-5)  # first of 150 warm-up steps


def test_refuses_what_cannot_train():
    with pytest.raises(UserError, match=r"optim.name: unknown optimizer 'rmsprob'"):
        optim.build("rmsprob")
    with pytest.raises(UserError, match=r"optim.learning_rate: nan is not a finite number"):
        optim.build("rmsprop", learning_rate=float("nan"))
