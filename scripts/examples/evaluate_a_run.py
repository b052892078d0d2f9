# %% [markdown]
"""
# Evaluating a run

A run leaves a folder with its config, metrics, checkpoints and model. Here a small one is trained, then measured:
metrics with 95% intervals, completions beside those of the reference, and the metrics of each step.

From the command line these are `dpo-jax train`, `dpo-jax eval` and `dpo-jax sample`.
"""

# %%
import itertools
import json
import sys
import tempfile
from pathlib import Path

import dpo_jax
from dpo_jax.data.sources import synthetic

given = [a for a in sys.argv[1:2] if not a.startswith("-")]  # in a notebook, the arguments are those of its kernel
work = Path(given[0] if given else tempfile.mkdtemp())
work.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A run
# A small model learns to write film reviews, then which ones are preferred. A callback sees the metrics of every step
# and evaluation.

# %%
small = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
(work / "config.json").write_text(json.dumps(small))
pairs = [
    {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
    for pair in itertools.islice(synthetic.read(responses=2), 1800)
]
settings = {"data": {"max_length": 96, "max_prompt_length": 32}, "samples": {"prompts": 0}, "batch_size": 32}
settings |= {"epochs": 9, "max_steps": 60, "eval_every": 640}
optim = {"name": "adamw", "learning_rate": 1e-2, "warmup_steps": 5, "max_grad_norm": 1.0}


def show(step, metrics, state):
    """Prints the accuracy of every evaluation."""
    if "eval_loss" in metrics:
        print(f"step {step}: held-out accuracy {metrics['eval_rewards/accuracies']:.3f}")


base = dpo_jax.train(
    settings,
    data=[{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs],
    model={"config": work / "config.json", "tokenizer": "synthetic"},
    loss={"name": "sft", "reduction": "mean"},
    optimizer=optim,
    run=work / "base",
)
run = dpo_jax.train(
    settings,
    data=pairs[:1400],
    eval_data=pairs[1400:1500],
    model=base.folder,
    loss={"name": "dpo", "beta": 0.1},
    optimizer=optim | {"learning_rate": 5e-4},
    max_steps=40,
    callbacks=[show],
    run=work / "dpo",
)

# %% [markdown]
# ## Metrics with intervals
# `evaluate` takes a run, or any model folder with `reference={"path": ...}`. It uses the run's held-out pairs unless it
# is given others: here 300 more of them, for narrower intervals.

# %%
found = dpo_jax.evaluate(run.folder, data=pairs[1500:], reward="synthetic", prompts=64, samples={"max_new_tokens": 48})
print(f"{'metric':32} {'mean':>8}   95% interval        n")
for name, entry in found.items():
    print(f"{name:32} {entry['mean']:8.3f}  {entry['low']:8.3f} .. {entry['high']:7.3f}  {entry['n']:5.0f}")
assert found["eval_rewards/accuracies"]["low"] > 0.5

# %% [markdown]
# ## Completions
# The same prompts with the same random numbers, by the policy and by its reference, the model that it started from.

# %%
prompts = ["This old drama", "My aunt chose this"]
completions = dpo_jax.sample(run.folder, prompts, samples={"max_new_tokens": 48}, seed=1)
for i, prompt in enumerate(prompts):
    for name, texts in completions.items():
        print(f"{prompt} |{name}| {texts[i]}")

# %% [markdown]
# ## Metrics of each step
# `metrics.jsonl` has one line for every step, and one with names in `eval_` for every evaluation.

# %%
lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
for line in lines:
    if "loss" in line and line["step"] % 10 == 1:
        print(f"step {line['step']:2}  loss {line['loss']:.4f}  margin {line['rewards/margins']:.3f}")
print(f"files: {', '.join(sorted(file.name for file in run.folder.iterdir()))}")
