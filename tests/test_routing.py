"""The router loss of mixtures: transformers' on separate sequences, and the same however a step is laid out."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_models import by_name, torch_gradients
from tiny import MILESTONE, folder_of, largest_difference, load_torch

from dpo_jax import losses, reference, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.errors import UserError
from dpo_jax.logprobs import batch_logps
from dpo_jax.models.families.registry import family
from dpo_jax.models.huggingface.folder import load_folder
from dpo_jax.models.model import build_model
from dpo_jax.models.routing import load_balance, token_counts
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.router import with_router_loss
from dpo_jax.training.shard import gather_on_use

WEIGHT = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")


@functools.cache
def table_of(count=8):
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(3, 128, rng.integers(low, high)).astype(np.int32)

    return Table.of(Tokens(ids(2, 30), (ids(2, 30), ids(2, 30))) for _ in range(count))


def one_step(folder, sizes=(1, 1, 1, 1), weight=WEIGHT, loss=None, compute="float32", **layout):
    """Returns the metrics of a step on a mesh, and the gradient: what plain gradient descent at rate 1 subtracts."""
    architecture, _, start = load_folder(folder)
    model = build_model(architecture, compute=compute)._replace(router_loss=weight)
    loss, tx, table = loss or losses.build("dpo"), optax.sgd(1.0), table_of()
    mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    shape = pack.choose_layout(
        table, max_length=60, batch_size=8, multiple_of=sharding.row_devices(mesh), parts=sharding.token_devices(mesh),
        **layout,
    )  # fmt: skip
    batch, count, _ = pack.build_batch(table, np.arange(8), shape)
    params = sharding.param_shardings(mesh, model.axes, start)
    shared, own = (sharding.mesh_collectives(mesh, tree) for tree in ((params, None), params))
    model = gather_on_use(model, shared, params)
    state = init_state(start, tx, loss)
    where = sharding.state_shardings_like(mesh, params, state)
    state, batch = sharding.put_params(jax.device_get(state), where), sharding.put_batch(mesh, batch)
    ref_logps = reference.make_ref_logps_fn(partial(batch_logps, model), own)
    batch = batch._replace(ref_logps=ref_logps(state.params, batch, np.int32(count)))
    step = jax.jit(make_train_step(model, loss, tx, collectives=shared), out_shardings=(where, None))
    new, metrics = jax.device_get(step(state, batch, np.int32(count)))
    return metrics, jax.tree.map(np.subtract, start, new.params), int(count)


@pytest.fixture(scope="module")
def expected(folder):
    """Of one microbatch on one device."""
    metrics, grads, count = one_step(folder)
    assert count == 1
    return metrics, grads


def test_the_balance_by_hand():
    """Of 4 tokens and 2 experts, k = 1: 3 and 1 of them; mean probabilities 0.6 and 0.4: 2 (0.45 + 0.1)."""
    routing = jnp.array([[[1.0, 1.0], [1.3, 0.7]], [[2.0, 0.0], [1.1, 0.9]]])
    value, slope = jax.value_and_grad(load_balance)(routing)
    assert value == pytest.approx(1.1)
    np.testing.assert_allclose(slope, [[[0, 0], [0.375, 0.125]]] * 2, atol=1e-6)  # E f_e / tokens, none for counts
    even = jnp.full((3, 2, 4), 5.0).at[:, 0].set(10.0)  # k = 2
    assert load_balance(even) == pytest.approx(2.0)


def test_tokens_count_as_often_as_in_separate_sequences():
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 3, 0]])
    branches = jnp.array([[0, 0, 1, 2, 0, 1, 0, 0]])
    present = jnp.array([[[True, True], [True, False], [True, True]]])
    layout = pack.choose_layout(table_of(), max_length=60, batch_size=8)
    batch, _, _ = pack.build_batch(table_of(), np.arange(8), layout)
    batch = batch._replace(segment_ids=segments, branch_ids=branches)
    assert token_counts(batch, present).tolist() == [[2, 2, 1, 1, 1, 1, 2, 0]]


def test_value_and_gradient_are_transformers_on_the_separate_sequences(folder, expected):
    """Padded, with an attention mask; without the last token of a response, which no packed row has."""
    import torch

    sequences = [np.concatenate([t.prompt, r])[:-1] for t in map(table_of().__getitem__, range(8)) for r in t.responses]
    longest = max(map(len, sequences))
    ids, mask = (
        torch.tensor(np.stack([np.pad(x, (0, longest - len(x))) for x in found]), dtype=torch.long)
        for found in (sequences, [np.ones(len(x)) for x in sequences])
    )
    model, (architecture, _, _) = load_torch(folder), load_folder(folder)
    theirs = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert expected[0]["aux_loss"] == pytest.approx(theirs.item(), rel=1e-6)
    (WEIGHT * theirs).backward()
    plain, grads, _ = one_step(folder, weight=0.0)
    assert "aux_loss" not in plain
    assert expected[0]["loss"] == pytest.approx(plain["loss"] + WEIGHT * theirs.item(), rel=1e-6)
    ours = jax.tree.map(np.subtract, expected[1], grads)  # what the router loss adds
    parameters = dict(model.named_parameters())  # the head, and what follows the last router, have no gradient
    wanted = {n: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for n, p in parameters.items()}
    wanted, found = torch_gradients(architecture, wanted), by_name(ours)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        np.testing.assert_allclose(found[name], gradient, atol=2e-6, err_msg=name)
    assert np.abs(wanted["layers/router/weight"]).max() > 1e-3


LAYOUTS = {
    "four microbatches": {"rows": 1, "length": 256},
    "a comparison in a row": {"rows": 8, "length": 96},
    "data": {"sizes": (4, 1, 1, 1)},
    "fsdp": {"sizes": (1, 4, 1, 1), "rows": 4},
    "tensor": {"sizes": (1, 1, 2, 1)},
    "sequence": {"sizes": (1, 1, 1, 2)},
    "fsdp and sequence": {"sizes": (1, 2, 1, 2), "rows": 2},
    "fsdp and tensor": {"sizes": (1, 2, 2, 1), "rows": 2},
    "expert": {"sizes": (1, 1, 1, 1, 4), "rows": 4},
    "data and expert": {"sizes": (2, 1, 1, 1, 2), "rows": 4},
    "fsdp and expert": {"sizes": (1, 2, 1, 1, 2), "rows": 4},
    "tensor and expert": {"sizes": (1, 1, 2, 1, 2), "rows": 2},
    "sequence and expert": {"sizes": (1, 1, 1, 2, 2), "rows": 2},
}
MARKS = dict.fromkeys(LAYOUTS, MILESTONE) | {"fsdp": ()}
MARKS |= dict.fromkeys(("four microbatches", "tensor and expert"), (pytest.mark.slow,))


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in LAYOUTS])
def test_the_step_is_the_same_however_it_is_laid_out(folder, expected, name):
    metrics, grads, count = one_step(folder, **LAYOUTS[name])
    assert count > 1 or "four" not in name
    for key in ("loss", "aux_loss"):
        assert metrics[key] == pytest.approx(expected[0][key], rel=2e-6)
    assert largest_difference(grads, expected[1]) < 1e-5


@pytest.mark.parametrize(
    ("compute", "limit"), [("float32", 5e-7), pytest.param("bfloat16", 2e-3, marks=pytest.mark.slow)]
)
def test_policy_and_reference_route_alike_at_the_start(folder, compute, limit):
    """Log-ratios are 0 up to the rounding of two programs, so that the loss is log 2: no token has another expert."""
    metrics, _, _ = one_step(folder, weight=0.0, compute=compute)
    assert metrics["loss"] == pytest.approx(np.log(2.0), abs=limit)
    assert abs(metrics["rewards/margins"]) < 4 * limit


CONFIG = {"num_attention_heads": 4, "hidden_size": 32, "vocab_size": 128, "num_hidden_layers": 2}


def test_the_weight_is_that_of_the_run_or_of_a_config_that_asks_for_it():
    model = build_model(family("qwen3_moe").architecture(CONFIG))
    asks = {"output_router_logits": True}
    cases = ((None, {}, 0.0), (None, asks, 0.001), (None, asks | {"router_aux_loss_coef": 0.02}, 0.02))
    cases += ((0.1, {}, 0.1), (0.0, asks, 0.0), (None, {"router_aux_loss_coef": 0.02}, 0.0))
    assert [with_router_loss(model, *given).router_loss for *given, _ in cases] == [weight for *_, weight in cases]


@pytest.mark.parametrize(
    ("kind", "weight", "message"),
    [
        ("qwen3_moe", -0.1, r"model.router_loss: -0.1: it must be a number, at least 0"),
        ("qwen3_moe", math.nan, r"model.router_loss: nan: it must be"),
        ("llama", 0.1, r"model.router_loss: 0.1, but a llama has no router; remove it"),
    ],
)
def test_weights_without_a_meaning_are_refused(kind, weight, message):
    with pytest.raises(UserError, match=message):
        with_router_loss(build_model(family(kind).architecture(CONFIG | {"intermediate_size": 8})), weight, {})
