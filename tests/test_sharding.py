"""Which axis lies where, as tables."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax import losses, optim, sharding
from dpo_jax.errors import UserError
from dpo_jax.step import init_state


def specs(tree):
    return [tuple(s.spec) for s in jax.tree.leaves(tree)]


def test_parameters_by_logical_axis():
    mesh = sharding.make_mesh(1, 2, 2)
    axes = {"embedding": ("vocab", "embed"), "q": ("layers", "embed", "heads", None), "odd": ("embed",)}
    shapes = {"embedding": (10, 4), "q": (3, 4, 2, 5), "odd": (3,)}
    arrays = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}
    laid = sharding.param_shardings(mesh, axes, arrays)
    assert tuple(laid["embedding"].spec) == ("tensor", "fsdp")
    assert tuple(laid["q"].spec) == (None, "fsdp", "tensor", None)
    assert tuple(laid["odd"].spec) == (None,)  # 3 cannot be halved


def test_optimizer_arrays_lie_as_their_parameters():
    mesh = sharding.make_mesh(1, 4, 1)
    params = {"w": jax.ShapeDtypeStruct((8, 3), np.float32), "b": jax.ShapeDtypeStruct((3,), np.float32)}
    laid = sharding.param_shardings(mesh, {"w": ("embed", None), "b": (None,)}, params)
    state = jax.eval_shape(lambda p: init_state(p, optax.adam(1e-3), losses.build({"name": "dpo"})), params)
    where = sharding.state_shardings_like(mesh, laid, state)
    adam = where.opt_state[0]
    for tree in (where.params, adam.mu, adam.nu):
        assert tuple(tree["w"].spec) == ("fsdp", None)
        assert tuple(tree["b"].spec) == (None,)
    assert (where.step.spec, adam.count.spec) == (P(), P())


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, *optim.OPTAX])
def test_the_state_of_every_optimizer_can_be_sharded(name):
    """Adafactor's state has arrays of one number for a vector of four, which four devices share."""
    mesh = sharding.make_mesh(1, 4, 1)
    shapes = {"w": (256, 256), "b": (4,)}
    params = {key: jax.ShapeDtypeStruct(shape, np.float32) for key, shape in shapes.items()}
    laid = sharding.param_shardings(mesh, {"w": ("embed", None), "b": ("embed",)}, params)
    assert tuple(laid["b"].spec) == ("fsdp",)
    state = jax.eval_shape(optim.build(name).init, params)
    where = sharding.state_shardings_like(mesh, laid, state)
    for leaf, s in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True):
        assert np.prod(s.shard_shape(leaf.shape)) in (np.prod(leaf.shape), np.prod(leaf.shape) / 4)


def test_rows_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 2, 1)
    assert sharding.row_devices(mesh) == 4
    assert tuple(sharding.batch_sharding(mesh).spec) == (None, ("data", "fsdp", "expert"))


BAD = [((3, 1, 1), "does not multiply to the 4"), ((-1, -1, 1), "one may be -1")]


@pytest.mark.parametrize(("sizes", "message"), BAD)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(*sizes)


def test_one_axis_takes_what_is_left():
    assert dict(sharding.make_mesh(-1, 2, 1).shape) == {"data": 2, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 1}
