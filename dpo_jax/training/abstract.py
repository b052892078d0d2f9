"""A run with shapes in place of arrays: its parameters, its batch and its mesh, to be compiled and not run."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax import losses, sharding
from dpo_jax.config.schema import Config
from dpo_jax.data import pack
from dpo_jax.models import qlora, reward_head
from dpo_jax.models.families.registry import architecture_of
from dpo_jax.models.huggingface.folder import model_folder, read_config
from dpo_jax.models.huggingface.hub import hub_config_file, is_hub_name
from dpo_jax.models.model import build_model
from dpo_jax.records import Batch, Sync
from dpo_jax.training.load import compute_dtype, initial_adapters, recomputed
from dpo_jax.training.router import with_router_loss
from dpo_jax.training.run import Run
from dpo_jax.training.targets import Target, target_devices

CPU_TOKENS = 1024  # in a microbatch of training on a CPU; more took time and memory (scripts/README.md)


def planned_mesh(config: Config, target: Target | None) -> tuple[jax.sharding.Mesh, list[int]]:
    """Returns the config's mesh over JAX's devices or a target's, and each device's group of fast links."""
    devices = jax.devices() if target is None else target_devices(target)
    groups = sharding.link_groups(devices) if target is None else target.groups
    mesh = sharding.make_mesh(*config.mesh.sizes, devices=devices, groups=groups)
    where = dict(zip(devices, groups, strict=True))
    return mesh, [where[device] for device in mesh.devices.flat]


def abstract_run(config: Config, narrow: bool = True, sync: Sync | None = None) -> Run:
    """Returns a run with shapes (`jax.ShapeDtypeStruct`) in place of parameters, and without data and folder.

    Args:
      config: the run's config.
      narrow: give the base of adapters the dtype of its files; else float32.
      sync: how the reference follows the policy.
    """
    path = config.model.path
    source = config.model.config or (hub_config_file(path) if is_hub_name(path) else model_folder(path))
    hf_config, loss = read_config(source, config.model.family), losses.build(config.loss)
    architecture = architecture_of(hf_config)
    architecture = reward_head.as_reward_architecture(architecture) if loss.rewards else architecture
    model = build_model(architecture, compute=compute_dtype(config.model), remat=recomputed(config.model))
    model = with_router_loss(model, config.model.router_loss, hf_config)
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    adapters, kind = initial_adapters(config.lora, architecture, 0)
    if kind is not None and narrow and config.model.path:
        dtype = jnp.dtype(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    if config.lora.base:
        params = qlora.quantize_base(
            params, architecture, config.lora.base, lambda f, x: jax.eval_shape(jax.vmap(f), x)
        )
    none: Any = None
    return Run(
        config=config, folder=none, lock=none, cache=none, model=model, loss=loss, sync=sync,
        params=params if kind is None else adapters, load_reference=None, train_table=none, eval_table=none,
        complete=None, prompts=[], kl_prompts=[], export=none, base=None if kind is None else params, lora=kind,
    )  # fmt: skip


def microbatch_tokens(platform: str) -> int:
    """Returns the most tokens in a microbatch on one device of a platform ("cpu", "gpu" or "tpu")."""
    return CPU_TOKENS if platform == "cpu" else pack.MICROBATCH_TOKENS


def with_cpu_rows(config: Config) -> Config:
    """Returns the config with `data.rows` set, if it was not, to the most that a run on JAX's CPUs has."""
    mesh, _ = planned_mesh(config, None)
    devices = sharding.row_devices(mesh), sharding.token_devices(mesh)
    rows = plan_layout(config, *devices, most_tokens=microbatch_tokens("cpu")).rows
    return dataclasses.replace(config, data=dataclasses.replace(config.data, rows=rows))


def plan_layout(config: Config, devices: int, parts: int = 1, most_tokens: int = pack.MICROBATCH_TOKENS) -> pack.Layout:
    """Returns the layout of a batch of full rows; by default rows of 2 * max_length tokens.

    Args:
      config: the run's config.
      devices: that share the rows of a microbatch.
      parts: devices that share the tokens of a row.
      most_tokens: in a microbatch on one device, unless a single row has more or the config sets `data.rows`.
    """
    pack.check_rows(config.data.rows, devices)
    pack.check_parts(config.data.row_length, parts)
    unit = pack.LENGTH_UNIT * parts if parts > 1 else 1
    length = config.data.row_length or -(-2 * config.data.max_length // unit) * unit
    most_rows = math.ceil(config.batch_size / devices)  # as in `pack`: a row holds a comparison or more
    rows = config.data.rows or devices * min(most_rows, max(1, most_tokens * parts // length))
    segments = min(config.batch_size, max(1, length // 64))
    return pack.Layout(math.ceil(config.batch_size / rows), rows, length, segments, length)


def abstract_batch(shape: pack.Layout, responses: int) -> Batch:
    """Returns the shapes and dtypes of a batch."""
    lead = (shape.microbatches, shape.rows)
    ints, floats = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.int32, jnp.float32))
    row, scored, places = (*lead, shape.length), (*lead, shape.scored), (*lead, shape.segments)
    answers = (*places, responses)
    fields = [ints(row)] * 4 + [ints(scored)] * 3 + [floats(places)] * 2 + [floats(answers), floats((*answers, 2))]
    return Batch(*fields)


def sharded_shape(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array with a sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def sharded_shapes(tree: Any, shardings: Any) -> Any:
    """Returns a tree of shapes with the given tree of shardings."""
    return jax.tree.map(sharded_shape, tree, shardings)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes on each device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def count_parameters(tree: Any) -> int:
    """Returns the number of elements in a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
