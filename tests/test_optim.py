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
    rate = optim.learning_rates(learning_rate=1e-6, warmup_steps=150)
    assert float(rate(0)) == pytest.approx(1e-6 / 151)
    assert float(rate(149)) == pytest.approx(1e-6 * 150 / 151)
    assert float(rate(150)) == pytest.approx(1e-6)
    assert float(rate(10_000)) == pytest.approx(1e-6)


def test_defaults_are_the_papers():
    tx = optim.build("rmsprop")
    grad = {"w": np.float32(2.0)}
    updates, _ = jax.jit(tx.update)(grad, tx.init(grad))
    assert float(updates["w"]) == pytest.approx(-1e-6 / 151 / np.sqrt(0.01), rel=1e-5)  # first of 150 warm-up steps


@pytest.mark.parametrize(("total", "warmup"), [(0, 150), (5, 0), (30, 3), (1499, 149), (1500, 150), (10**6, 150)])
def test_the_default_warm_up_is_at_most_a_tenth_of_the_run(total, warmup):
    rate = optim.learning_rates(learning_rate=1.0, total_steps=total)
    assert [float(rate(warmup - 1)), float(rate(warmup))] == pytest.approx([warmup / (warmup + 1), 1.0])


@pytest.mark.parametrize(
    ("schedule", "theirs", "options"),
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("cosine_with_min", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("inverse_sqrt", "inverse_sqrt", {"timescale": 10}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 18, "min_lr_ratio": 0.1, "decay_type": "linear"}),
    ],
)
def test_schedules_are_those_of_transformers_after_the_warm_up(schedule, theirs, options):
    """The warm-up differs: the original code's first update has a rate above 0, transformers' has 0."""
    from transformers import get_scheduler

    total, warmup = 100, 10
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    steps = {} if theirs == "constant_with_warmup" else {"num_training_steps": total}
    found = get_scheduler(theirs, torch_optimizer, warmup, **steps, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(total):
        expected.append(torch_optimizer.param_groups[0]["lr"])
        torch_optimizer.step()
        found.step()
    given = {"schedule": schedule, "min_ratio": 0.1, "decay_ratio": 0.2, "total_steps": total}
    for warm in ({"warmup_steps": warmup}, {"warmup_ratio": 0.095}):
        rate = optim.learning_rates(learning_rate=2e-3, **given, **warm)
        np.testing.assert_allclose(
            [float(rate(t)) for t in range(warmup, total)], expected[warmup:], rtol=1e-5, atol=1e-9
        )
        np.testing.assert_allclose(
            [float(rate(t)) for t in range(warmup)], 2e-3 * np.arange(1, warmup + 1) / (warmup + 1), rtol=1e-6
        )
    last = float(rate(total + 7))  # and stays there
    least = {"constant": 2e-3, "linear": 0.0, "cosine": 0.0, "cosine_with_min": 2e-4, "wsd": 2e-4}
    least["inverse_sqrt"] = 2e-3 * (10 / 107) ** 0.5
    assert last == pytest.approx(least[schedule], abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, r"optim.schedule: needs the number of updates; set optim.total_steps"),
        ({"warmup_ratio": 0.1}, r"optim.warmup_ratio: needs the number of updates; set optim.total_steps"),
        ({"schedule": "lineal", "total_steps": 9}, r"optim.schedule: 'lineal' is none; known: constant, linear"),
        (
            {"warmup_ratio": 0.1, "warmup_steps": 0, "total_steps": 9},
            "warmup_steps and warmup_ratio are both set; remove one",
        ),
        ({"warmup_ratio": 1.5, "total_steps": 9}, r"optim.warmup_ratio: 1.5 is more than the whole run"),
        ({"schedule": "wsd", "decay_ratio": 2.0, "total_steps": 9}, r"optim.decay_ratio: 2.0 is no share"),
    ],
)
def test_schedules_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        optim.build("rmsprop", **options)


@pytest.mark.parametrize("key", ["learning_rate", "max_grad_norm", "eps", "min_ratio", "total_steps"])
def test_only_the_warm_up_may_be_left_open_by_a_negative_number(key):
    with pytest.raises(UserError, match=rf"^optim.{key}: -1 is not a finite number >= 0; change it"):
        optim.build("rmsprop", **{key: -1})
    assert optim.build("rmsprop", warmup_steps=-1, warmup_ratio=-1.0)


def test_an_optimizer_takes_the_rates_by_position():
    def earlier(*, learning_rate: float = 1.0):
        return optax.sgd(learning_rate)

    with pytest.raises(UserError, match=r"optimizer earlier: define it as \(rate, \*, option=default, ...\)"):
        optim.register_optimizer(earlier)
    assert "earlier" not in optim.OPTIMIZERS


def test_the_state_of_adamw_is_that_of_optax():
    """So that checkpoints of runs before weight decay spared norms and biases are read."""
    ours, theirs = (tx.init(PARAMS) for tx in (optim.build("adamw"), optax.chain(optax.identity(), optax.adamw(1.0))))
    scheduled = optax.chain(optax.identity(), optax.adamw(lambda count: 1.0)).init(PARAMS)
    assert jax.tree.structure(ours) == jax.tree.structure(scheduled) != jax.tree.structure(theirs)


def test_a_run_that_ends_in_its_warm_up_is_told():
    section = {"name": "rmsprop", "learning_rate": 1e-6, "warmup_steps": 150, "total_steps": 30}
    note = optim.warmup_note(section, 30)
    assert note.startswith(
        "the warm-up takes 150 updates (optim.warmup_steps) and the run has 30, so that the learning"
    )
    assert "ends at 2e-07 instead of 1e-06" in note  # 30 / 151
    assert optim.warmup_note(section, 151) == ""
    assert optim.warmup_note(section | {"warmup_steps": -1}, 30) == ""


PARAMS = {
    "embedding": np.ones((8, 4), np.float32),
    "final_norm": {"scale": np.ones(4, np.float32)},
    "layers": {
        "q": {"kernel": np.ones((2, 4, 2, 2), np.float32), "bias": np.ones((2, 2, 2), np.float32)},
        "o": {"kernel": np.ones((2, 2, 2, 4), np.float32)},
        "up": {"kernel": np.ones((2, 4, 6), np.float32)},
    },
}


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, *optim.OPTAX])
def test_every_optimizer_descends_and_knows_its_rate(name):
    """On a sum of squares, 20 updates with float64's exact gradient; the first update is one of the warm-up."""
    peak = 1.0 if name == "prodigy" else 1e-2  # which multiplies the rate that it finds
    tx = optim.build(name, learning_rate=peak, warmup_steps=1)
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda x: 2 * (x - 0.5), params), state, params)
        return optax.apply_updates(params, updates), state

    def value(params):
        return sum(float(np.sum((np.asarray(x, np.float64) - 0.5) ** 2)) for x in jax.tree.leaves(params))

    for _ in range(20):
        params, state = step(params, state)
    assert value(params) < value(PARAMS)
    assert [float(tx.learning_rate(t)) for t in (0, 1)] == pytest.approx([peak / 2, peak])


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "lamb"])
def test_weight_decay_leaves_norms_and_biases(name):
    tx, params = optim.build(name, learning_rate=1e-2, warmup_steps=0, weight_decay=0.5), dict(PARAMS)
    params["layers"] = PARAMS["layers"] | {"router": {"expert_scale": np.ones((2, 4), np.float32)}}  # Gemma 4's
    updates, _ = tx.update(jax.tree.map(np.zeros_like, params), tx.init(params), params)
    moved = {jax.tree_util.keystr(k): float(np.abs(x).max()) for k, x in jax.tree_util.tree_leaves_with_path(updates)}
    for key, size in moved.items():
        assert (size == 0) == key.endswith(("scale']", "['bias']")), (key, size)
    if name == "adamw":
        assert moved["['embedding']"] == pytest.approx(1e-2 * 0.5)


def test_muon_orthogonalizes_the_matrix_of_each_layer():
    """Heads and their size are one axis. Singular values 1, 0.9, .. of a gradient become nearly equal, 0.7 .. 1.2."""
    rng, shapes, vectors = np.random.default_rng(0), {"q": (4, 4), "o": (4, 4), "up": (4, 6)}, {}
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)
    for name, shape in shapes.items():
        u, _, v = np.linalg.svd(grads["layers"][name]["kernel"].reshape(2, *shape), full_matrices=False)
        vectors[name], matrices = (u, v), u * np.linspace(1.0, 0.7, 4) @ v
        grads["layers"][name]["kernel"] = matrices.reshape(PARAMS["layers"][name]["kernel"].shape).astype(np.float32)
    tx = optim.build("muon", learning_rate=1.0, warmup_steps=0, max_grad_norm=1e9)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    for name, shape in shapes.items():
        for layer, u, v in zip(
            np.asarray(updates["layers"][name]["kernel"]).reshape(2, *shape), *vectors[name], strict=True
        ):
            # As large as AdamW's: 0.2 sqrt(max(in, out)) times the singular values (arXiv 2502.16982).
            values = -u.T @ layer @ v.T / (0.2 * np.sqrt(max(shape)))
            assert 0.6 < values.diagonal().min() <= values.diagonal().max() < 1.3, name
            np.testing.assert_allclose(values, np.diag(values.diagonal()), atol=0.02, err_msg=name)
    adam = optax.adam(1.0, nesterov=True)
    others, _ = adam.update(grads, adam.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["embedding"], others["embedding"], rtol=1e-5)


def test_refuses_what_cannot_train():
    with pytest.raises(UserError, match=r"optim.name: unknown optimizer 'rmsprob'"):
        optim.build("rmsprob")
    with pytest.raises(UserError, match=r"optim.learning_rate: nan is not a finite number"):
        optim.build("rmsprop", learning_rate=float("nan"))


@pytest.mark.parametrize("name", ["lbfgs", "schedule_free_adamw"])
def test_an_optimizer_of_optax_that_no_config_can_name_is_told_apart_from_a_misspelling(name):
    with pytest.raises(UserError, match=f"optim.name: {name} of optax needs more than gradients, or options that no"):
        optim.build(name=name)
