"""The paper's configs at the paper's size: traced to their first step, with nothing allocated."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpo_jax import config, losses, models, optim, sharding
from dpo_jax.config import Config
from dpo_jax.data import pack
from dpo_jax.folders import VARIANTS
from dpo_jax.logprobs import batch_logps
from dpo_jax.records import Batch
from dpo_jax.step import init_state, make_train_step

ROOT = Path(__file__).parent.parent
PYTHIA_28B = {
    "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 10240,
    "num_hidden_layers": 32, "num_attention_heads": 32, "rotary_pct": 0.25, "max_position_embeddings": 2048,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "use_parallel_residual": True, "tie_word_embeddings": False,
}  # fmt: skip


def abstract_batch(shape, responses):
    lead = (shape.microbatches, shape.rows)
    ints, floats = (partial(jax.ShapeDtypeStruct, dtype=d) for d in (jnp.int32, jnp.float32))
    row, scored, places = (*lead, shape.length), (*lead, shape.scored), (*lead, shape.groups)
    return Batch(
        *(ints(row),) * 4,
        *(ints(scored),) * 3,
        floats(places),
        floats(places),
        *(floats((*places, responses, *two)) for two in ((), (2,))),
    )


@pytest.mark.parametrize("name", ["hh_pythia28_sft", "hh_pythia28_dpo"])
def test_the_papers_size_traces_to_the_first_step(name):
    c = config.parse(Config, str(ROOT / f"configs/{name}.yaml"), [], prog="x", variants=VARIANTS)
    loss, tx = losses.build(c.loss), optim.build(**c.optim)
    architecture = models.family("gpt_neox").architecture(PYTHIA_28B)
    model = models.build(architecture, compute=c.model.compute, remat=c.model.remat)
    params = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    assert sum(x.size for x in jax.tree.leaves(params)) == 2_775_208_960  # as its model card
    state = jax.eval_shape(partial(init_state, tx=tx), params)
    shape = pack.Shape(microbatches=16, rows=4, length=2 * c.data.max_length, groups=10, scored=896)
    step = make_train_step(partial(batch_logps, model), loss, tx)
    new, metrics = jax.eval_shape(step, state, abstract_batch(shape, loss.responses), jnp.int32(3))
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(str(a)), new, state)
    assert {m.dtype for m in metrics.values()} == {jnp.dtype("float32")}
    mesh = sharding.make_mesh(1, 4, 1)
    laid = sharding.of_state(mesh, sharding.of_params(mesh, model.axes, params), state)
    split = [s.spec for s in jax.tree.leaves(laid.opt_state) if any(s.spec)]
    assert len(split) == len([s for s in jax.tree.leaves(laid.params) if any(s.spec)])  # RMSprop keeps one array each
    assert dataclasses.asdict(c)["optim"]["learning_rate"] == 5e-7
