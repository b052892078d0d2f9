# %% [markdown]
"""
# LoRA

DPO of low-rank adapters (arXiv 2106.09685). The base model is frozen and is the reference, so that one copy of it is in
memory. The run writes the adapters, and a model with the adapters merged in.
"""

# %%
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax import losses
from dpo_jax.data.sources import synthetic

given = [a for a in sys.argv[1:2] if not a.startswith("-")]  # in a notebook, the arguments are those of its kernel
work = Path(given[0] if given else tempfile.mkdtemp())
work.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A base model
# With a model of the Hugging Face hub this is `base = "owner/name"`. Here a small Llama learns to write film reviews.

# %%
pairs = [
    {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
    for pair in itertools.islice(synthetic.read(responses=2), 1500)
]
small = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
(work / "config.json").write_text(json.dumps(small))
settings = {"data": {"max_length": 96, "max_prompt_length": 32}, "samples": {"prompts": 0}}
settings |= {"batch_size": 32, "epochs": 3, "eval_every": 0}
base = dpo_jax.train(
    settings,
    data=[{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs],
    model={"config": work / "config.json", "tokenizer": "synthetic"},
    loss={"name": "sft", "reduction": "mean"},
    optimizer={"name": "adamw", "learning_rate": 1e-2, "warmup_steps": 5, "max_grad_norm": 1.0},
    max_steps=60,
    run=work / "base",
).folder

# %% [markdown]
# ## DPO of adapters
# The section `lora` makes a run train adapters. `targets` names the projections that get one: all of them here.

# %%
result = dpo_jax.train(
    settings,
    data=pairs[:-200],
    eval_data=pairs[-200:],
    model=base,
    lora={"rank": 8, "alpha": 16.0, "targets": ["all-linear"]},
    loss={"name": "dpo", "beta": 0.1},
    optimizer={"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 5, "max_grad_norm": 1.0},
    max_steps=30,
    run=work / "lora",
)
before = json.loads((result.folder / "metrics.jsonl").open().readline())
print(f"held-out loss {before['eval_loss']:.4f} -> {result.metrics['eval_loss']:.4f}")
print(f"held-out accuracy {before['eval_rewards/accuracies']:.3f} -> {result.metrics['eval_rewards/accuracies']:.3f}")
assert abs(before["eval_loss"] - math.log(2)) < 1e-5  # new adapters change nothing: the policy is the reference

# %% [markdown]
# ## What was written
# `adapter/` is a folder for PEFT, `model/` one for transformers and vLLM.

# %%
adapter = load_file(result.folder / "adapter/adapter_model.safetensors")
whole = load_file(result.folder / "model/model.safetensors")
trained, total = (sum(x.size for x in tensors.values()) for tensors in (adapter, whole))
print(f"{trained:,} parameters are trained, {trained / total:.0%} of the {total:,} of the model")
print(json.loads((result.folder / "adapter/adapter_config.json").read_text()))

# %% [markdown]
# ## The reference is the base
# The functions compute the held-out margin again, with the merged model as the policy and the base as the reference.

# %%
loss = losses.build({"name": "dpo", "beta": 0.1})
model, merged, tokenizer = dpo_jax.load_model(result.folder)
batch, count = dpo_jax.collate(dpo_jax.tokenize(pairs[-200:], tokenizer, max_length=96), range(200))
batch = dpo_jax.with_reference(model, dpo_jax.load_model(base)[1], batch, count)
lp = dpo_jax.sequence_logps(model, merged, batch)
margin = float(losses.weighted_means(loss.metrics(lp), lp.weights)["rewards/margins"])
print(f"margin {margin:.5f} by the functions, {result.metrics['eval_rewards/margins']:.5f} by the run")
np.testing.assert_allclose(margin, result.metrics["eval_rewards/margins"], rtol=1e-3)
