# %% [markdown]
"""
# One step on several devices

The same train step three times: on one device, under `jax.pmap`, and under `jax.jit` on a mesh that shards the
parameters too. The step is a pure function: the caller compiles it and decides where it runs. All three give the same
loss.

Four CPU devices are emulated here, so that no accelerator is needed. Skip the first cell to use your own devices, an
even number of them.
"""

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # read once, when JAX starts
os.environ["JAX_PLATFORMS"] = "cpu"

# %%
import itertools

import jax
import numpy as np
import optax

import dpo_jax
from dpo_jax import losses, sharding
from dpo_jax.data import pack
from dpo_jax.data.sources import synthetic

DEVICES = jax.device_count()
print(f"{DEVICES} devices: {jax.devices()}")

# %% [markdown]
# ## A model, a batch, a loss
# A batch has fields `[M, R, ...]`: M microbatches, one after another, of R rows. Devices share the rows, so R must be a
# multiple of their number.

# %%
config = {"model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
model, params = dpo_jax.init_model(config)
rows = [
    {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
    for pair in itertools.islice(synthetic.read(responses=2), 64)
]
table = dpo_jax.tokenize(rows, synthetic.synthetic_tokenizer(), max_length=96)
layout = pack.choose_layout(table, max_length=96, batch_size=len(table), multiple_of=DEVICES)
batch, count = dpo_jax.collate(table, np.arange(len(table)), layout)
batch = jax.device_get(dpo_jax.with_reference(model, params, batch, count))
print("batch.tokens", batch.tokens.shape)

loss, tx = losses.build({"name": "dpo", "beta": 0.5}), optax.adam(1e-3)


# %%
def three_steps(step, state, batch):
    """Returns the losses of three updates on one batch."""
    found = []
    for _ in range(3):
        state, metrics = step(state, batch, count)
        found.append(float(metrics["loss"]))
    return np.array(found)


# %% [markdown]
# ## One device

# %%
step = jax.jit(dpo_jax.make_train_step(model, loss, tx))
one = three_steps(step, dpo_jax.init_state(params, tx, loss), batch)
print("one device ", one)

# %% [markdown]
# ## pmap
# Every device holds the whole state and its own rows: `[M, R, ...]` becomes `[M, devices, R / devices, ...]`, mapped
# over axis 1. `pmap_collectives` sums gradients over the devices and gathers the log-probs that metrics need.

# %%
collectives = sharding.pmap_collectives(sharding.make_mesh())
pure = dpo_jax.make_train_step(model, loss, tx, collectives=collectives)
step = jax.pmap(pure, axis_name=sharding.MAPPED, in_axes=(None, 1, None), out_axes=None)
by_device = jax.tree.map(lambda x: x.reshape(x.shape[0], DEVICES, -1, *x.shape[2:]), batch)
mapped = three_steps(step, dpo_jax.init_state(params, tx, loss), by_device)
print("pmap       ", mapped)

# %% [markdown]
# ## jit on a mesh
# All devices share the rows, and every two of them share a copy of the parameters (FSDP). The step is
# that of one device: shardings of its arguments are enough, and XLA adds the communication.

# %%
mesh = sharding.make_mesh(data=-1, fsdp=2)
sharded = jax.device_put(params, sharding.param_shardings(mesh, model.axes, params))
state = jax.jit(lambda params: dpo_jax.init_state(params, tx, loss))(sharded)
step = jax.jit(dpo_jax.make_train_step(model, loss, tx))
meshed = three_steps(step, state, jax.device_put(batch, sharding.batch_sharding(mesh)))
print("mesh       ", meshed, sharded["embedding"].sharding.spec)

# %%
np.testing.assert_allclose(mapped, one, atol=1e-5)
np.testing.assert_allclose(meshed, one, atol=1e-5)
