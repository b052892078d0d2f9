# %% [markdown]
"""
# Your own loss, ablated over beta

A loss is a function of log-probs. Here is one that the package lacks, trained with five values of beta in one call,
and a plot of what beta does: the accuracy and the margin of the implicit reward on held-out pairs.

The figure and the runs go to the folder that is the first argument, or to a temporary one.
"""

# %%
import itertools
import json
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

import dpo_jax
from dpo_jax import Logps, losses
from dpo_jax.data.sources import synthetic

given = [a for a in sys.argv[1:2] if not a.startswith("-")]  # in a notebook, the arguments are those of its kernel
work = Path(given[0] if given else tempfile.mkdtemp())


# %% [markdown]
# ## The loss
# `Logps` has `policy` and `reference`, float32[B, 2]: log-probs of the chosen and the rejected response of B pairs. The
# result is one value per pair; the package computes means, metrics and gradients. Keyword-only parameters are the
# options of the loss.
#
# DPO's loss is $-\log p$ with $p = \sigma(\beta \cdot \text{margin})$, the modelled probability of the label. This one
# multiplies it by $(1 - p)^\gamma$, as focal loss does in vision, so that pairs that are right already count less.


# %%
def focal(lp, *, beta: float = 0.1, gamma: float = 1.0):
    """DPO, with less weight on pairs that the policy has right already.

    Args:
      lp: log-probs.
      beta: Strength of the implicit KL penalty.
      gamma: How much less; 0 is DPO.
    """
    ratios = lp.policy - lp.reference
    logits = beta * (ratios[:, 0] - ratios[:, 1])
    return jax.nn.sigmoid(-logits) ** gamma * -jax.nn.log_sigmoid(logits)


# %% [markdown]
# A check by hand, on plain lists: with `gamma=0` it is DPO.

# %%
lp = Logps.of(policy=[[-8.0, -12.0], [-11.0, -11.0]], reference=[[-10.0, -12.0], [-10.0, -12.0]])
print("focal:", focal(lp, beta=0.5), " gamma=0:", focal(lp, beta=0.5, gamma=0.0), " DPO:", losses.dpo(lp, beta=0.5))

# %% [markdown]
# ## The ablation
# Film reviews with a known true reward, and a small model with random weights: what it learns, it learns from the
# preferences. Runs that differ in numbers of the loss only share their data and their compiled step.

# %%
pairs = [
    {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
    for pair in itertools.islice(synthetic.read(responses=2), 1200)
]
small = {"model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
work.mkdir(parents=True, exist_ok=True)
(work / "config.json").write_text(json.dumps(small))
settings = {
    "model": {"config": work / "config.json", "tokenizer": "synthetic"},
    "data": {"max_length": 96, "max_prompt_length": 32, "eval_fraction": 0.3, "eval_examples": None},
    "optim": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 5, "max_grad_norm": 1.0},
    "samples": {"prompts": 0},
}
settings |= {"batch_size": 32, "max_steps": 25, "eval_every": 0}
betas = [0.01, 0.05, 0.2, 1.0, 5.0]
results = dpo_jax.sweep(settings, {"loss.beta": betas}, data=pairs, loss=focal, run=work / "runs")

accuracy = [result.metrics["eval_rewards/accuracies"] for result in results]
margin = [result.metrics["eval_rewards/margins"] / beta for result, beta in zip(results, betas, strict=True)]
for row in zip(betas, accuracy, margin, strict=True):
    print("beta {:<5}  accuracy {:.3f}  margin {:6.2f} nats".format(*row))

# %% [markdown]
# ## The figure
# The margin is divided by beta, so it is in nats of log-probs: a small beta lets the policy go far from the reference.

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for ax, values, label in zip(axes, (accuracy, margin), ("accuracy on held-out pairs", "margin, nats"), strict=True):
    ax.semilogx(betas, values, "o-")
    ax.set(xlabel="beta", ylabel=label)
axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
figure.savefig(work / "beta.svg")
print(f"wrote {work / 'beta.svg'}; a report of the runs: dpo-jax report {work / 'runs'}/*")
