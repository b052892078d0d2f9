"""The compiled train step of a small model on emulated devices, and its collectives."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from dpo_jax import losses, optim, sharding
from dpo_jax.data import pack
from dpo_jax.data.table import Table
from dpo_jax.models.families.registry import family
from dpo_jax.models.model import build_model
from dpo_jax.records import Tokens
from dpo_jax.step import init_state, make_train_step
from dpo_jax.training.program import Collective, collectives
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


def compiled_step(
    sizes: tuple[int, ...],
    rows: int,
    compute: str = "float32",
    length: int = 128,
    config: Mapping[str, Any] = CONFIG,
) -> tuple[list[Collective], Any, Any]:
    """Returns the collectives of the train step on a mesh, the shapes of the parameters, and the program.

    Args:
      sizes: data, fsdp, tensor and, if not 1, sequence and expert: all devices there are.
      rows: of a microbatch, over all devices.
      compute: dtype of activations.
      length: of a row, in tokens.
      config: of the model.
    """
    rng = np.random.default_rng(0)
    draw = partial(rng.integers, 1, 128, dtype=np.int32)
    table = Table.of(Tokens(draw(rng.integers(2, 12)), (draw(20), draw(15))) for _ in range(2 * COMPARISONS))
    model = build_model(family(config["model_type"]).architecture(config), compute=compute)
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
    return collectives(program.as_text() or "", mesh.size, (shape.microbatches,)), shapes.params, program
