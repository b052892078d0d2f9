"""Which collectives the compiled train step of a small model has, read from XLA's own text of it."""

import math
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax import losses, optim, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.shard import gather_on_use

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
COMPARISONS = 32

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
LINE = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results, as (dtype, sizes).
      loops: 0 if it happens once, 1 in every microbatch, 2 in every layer or chunk of one.
      devices: how many take part in each group of it; 0 where the text does not say.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    loops: int
    devices: int

    @property
    def bytes(self) -> int:
        """The size of its results on a device."""
        return sum(BYTES[dtype] * math.prod(sizes) for dtype, sizes in self.shapes)


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program in which more than one device takes part.

    Args:
      text: `compiled.as_text()`.
    """
    found = []
    for line in text.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        shapes = tuple(
            (dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in SHAPE.findall(match[1])
        )
        name = re.search(r'op_name="([^"]*)"', line)
        one = Collective(match[2], shapes, name[1].count("while/body") if name else 0, _group(line))
        if one.devices != 1:
            found.append(one)
    return found


def _group(line: str) -> int:
    """Returns how many devices are in a group, in any of the three ways to write it."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(tiled[1])
    return 0


def compiled_step(
    sizes: tuple[int, ...], rows: int, compute: str = "float32", length: int = 128
) -> tuple[list[Collective], Any, Any]:
    """Returns the collectives of the train step on a mesh, the shapes of the parameters, and the program.

    Args:
      sizes: data, fsdp, tensor and, if not 1, sequence: all devices there are.
      rows: of a microbatch, over all devices.
      compute: dtype of activations.
      length: of a row, in tokens.
    """
    rng = np.random.default_rng(0)
    draw = partial(rng.integers, 1, 128, dtype=np.int32)
    table = Table.of(Tokens(draw(rng.integers(2, 12)), (draw(20), draw(15))) for _ in range(2 * COMPARISONS))
    model = build_model(family("llama").architecture(CONFIG), compute=compute)
    loss = losses.build({"name": "dpo", "beta": 0.5})
    mesh, tx = sharding.make_mesh(*sizes), optim.build("rmsprop", learning_rate=1e-3, warmup_steps=2)
    shapes = jax.eval_shape(lambda k: init_state(model.init(k), tx, loss), jax.random.key(0))
    params = sharding.param_shardings(mesh, model.axes, shapes.params)
    where = sharding.state_shardings_like(mesh, params, shapes)
    state = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    shape = pack.choose_layout(table, max_length=32, batch_size=COMPARISONS, rows=rows, length=length)
    batch = jax.eval_shape(lambda: pack.build_batch(table, np.arange(COMPARISONS), shape)[0])
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)), batch
    )
    shared = sharding.mesh_collectives(mesh, (params, None))
    step = make_train_step(gather_on_use(model, shared, params), loss, tx, collectives=shared)
    out = (where, sharding.replicated(mesh))
    program = jax.jit(step, donate_argnums=0, out_shardings=out).lower(state, batch, np.int32(1)).compile()
    return collectives(program.as_text() or ""), shapes.params, program
