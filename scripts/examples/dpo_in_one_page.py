# %% [markdown]
"""
# DPO in one page

The whole of Direct Preference Optimization (arXiv 2305.18290) with the functions of `dpo_jax`: a model, examples as
token ids, packed batches, reference log-probs, a train step, and completions before and after.

The model is small and the data are made up, so that this takes less than a minute on a CPU and needs no network:
film reviews of a few sentences, whose true reward is the sum of the scores of their words.
"""

# %%
import itertools
import json
import math
from typing import Any

import jax
import numpy as np
import optax

import dpo_jax
from dpo_jax import losses
from dpo_jax.data.sources import synthetic

# %% [markdown]
# ## A model
# A pre-trained model takes one line, `model, params, tokenizer = dpo_jax.load_model("gpt2")`. Here we make a Llama of
# two layers with random weights: `model` holds pure functions, `params` is a nested dict of arrays.

# %%
config = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
model, params = dpo_jax.init_model(config)
tokenizer: Any = synthetic.synthetic_tokenizer()
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")

# %% [markdown]
# ## Data
# Examples are dicts. A preference pair has a prompt, a chosen and a rejected response. The table holds their token ids;
# `collate` packs some of its examples into one batch, each prompt once, several examples to a row.

# %%
pairs = [
    {"prompt": pair.prompt, "chosen": pair.responses[0], "rejected": pair.responses[1]}
    for pair in itertools.islice(synthetic.read(responses=2), 2000)
]
demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
print(json.dumps(pairs[0], indent=1))


# %% [markdown]
# ## Training
# A loss is a pure function of log-probs, an optimizer any optax transformation, a step a pure function that we compile.
# The reference log-probs are a field of the batch: the step never sees a second model.


# %%
def fit(params, table, loss, learning_rate, steps, batch_size=64):
    """Returns the trained parameters and the metrics of every step; the reference is `params`, frozen."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    step = jax.jit(dpo_jax.make_train_step(model, loss, tx))
    state, history = dpo_jax.init_state(params, tx, loss), []
    for i in range(steps):
        batch, count = dpo_jax.collate(table, (np.arange(batch_size) + i * batch_size) % len(table))
        if loss.uses_reference:
            batch = dpo_jax.with_reference(model, params, batch, count)
        state, metrics = step(state, batch, count)
        history.append({name: float(value) for name, value in metrics.items()})
    return state.params, history


# %% [markdown]
# First the model learns to write reviews: supervised fine-tuning, a loss of one response to a prompt.

# %%
sft_table = dpo_jax.tokenize(demonstrations, tokenizer, max_length=96, responses=1)
sft, history = fit(params, sft_table, losses.build({"name": "sft", "reduction": "mean"}), 1e-2, steps=50)
print(f"fine-tuning: loss {history[0]['loss']:.2f} -> {history[-1]['loss']:.2f} nats a token")

# %% [markdown]
# Then DPO. At step 0 the policy equals the reference, all log-ratios are 0, and the loss is $-\log\sigma(0) = \log 2$.

# %%
table = dpo_jax.tokenize(pairs, tokenizer, max_length=96)
policy, history = fit(sft, table, losses.build({"name": "dpo", "beta": 0.1}), 5e-4, steps=30)
for i in (0, 10, 20, 29):
    shown = ("loss", "rewards/accuracies", "rewards/margins")
    print(f"step {i:2}", *(f"{name} {history[i][name]:.4f}" for name in shown), sep="  ")
assert abs(history[0]["loss"] - math.log(2)) < 1e-5

# %% [markdown]
# ## Before and after
# Completions of 64 prompts by both models, and their mean true reward in nats.

# %%
texts = synthetic.synthetic_prompts("test", 64)
prompts = [np.array(tokenizer(text)["input_ids"]) for text in texts]
for name, weights in (("before", sft), ("after", policy)):
    found = dpo_jax.generate(model, weights, prompts, max_new_tokens=48, eos_id=tokenizer.eos_token_id)
    completions = tokenizer.batch_decode(found, skip_special_tokens=True)
    reward = np.mean([synthetic.synthetic_reward(*pair) for pair in zip(texts, completions, strict=True)])
    print(f"{name}: true reward {reward:.2f}, for example: {texts[0]}{completions[0]}")
