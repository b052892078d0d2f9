"""How a step of dpo_jax grows: with batch size, length of prompts and responses, and vocabulary.

Random weights and random tokens; time is the median of some steps, memory is what the compiled step asks for beside its
arguments (XLA's own figure), so that it does not depend on what the process had before.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BASE = {"batch size": 8, "prompt tokens": 128, "response tokens": 64, "vocabulary": 8192}
AXES = {
    "batch size": (4, 8, 16, 32, 64),
    "prompt tokens": (64, 128, 256, 512, 1024),
    "response tokens": (32, 64, 128, 256, 512),
    "vocabulary": (4096, 8192, 16384, 32768, 65536),
}


def growth(repeats: int = 5) -> dict[str, list[dict[str, float]]]:
    """Measures and prints every axis, the others at their base values."""
    found: dict[str, list[dict[str, float]]] = {}
    for axis, values in AXES.items():
        found[axis] = []
        for value in values:
            row = {axis: value, **measure(BASE | {axis: value}, repeats)}
            found[axis].append(row)
            print(
                f"{axis:<16}{value:>8}{row['tokens']:>9.0f} tokens{row['milliseconds']:>10.1f} ms"
                f"{1e3 * row['milliseconds'] / row['tokens']:>9.1f} us a token{row['temporary_mb']:>9.1f} MB",
                flush=True,
            )
    return found


def measure(sizes: dict[str, int], repeats: int) -> dict[str, float]:
    """Returns the tokens in a step's rows, its time and its temporary memory."""
    import jax

    from dpo_jax import losses, optim
    from dpo_jax.data import pack
    from dpo_jax.data.table import Table
    from dpo_jax.models.families.registry import family
    from dpo_jax.models.model import build_model
    from dpo_jax.records import Tokens
    from dpo_jax.step import init_state, make_train_step

    batch_size, prompt, response, vocabulary = sizes.values()
    random = np.random.default_rng(0)
    draw = partial(random.integers, 1, vocabulary, dtype=np.int32)
    table = Table.of(Tokens(draw(prompt), (draw(response), draw(response))) for _ in range(batch_size))
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config |= {"intermediate_size": 1024, "vocab_size": vocabulary, "max_position_embeddings": 4096}
    model = build_model(family("llama").architecture(config))
    tx = optim.build("rmsprop", learning_rate=1e-6, warmup_steps=0)
    loss = losses.build({"name": "dpo"})
    state = init_state(jax.jit(model.init)(jax.random.key(0)), tx, loss)
    shape = pack.choose_layout(table, max_length=prompt + response, batch_size=batch_size)
    batch, count, _ = pack.build_batch(table, np.arange(batch_size), shape, np.zeros((batch_size, 2, 2), np.float32))
    step = make_train_step(model, loss, tx)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, np.int32(count)).compile()
    batch = jax.device_put(batch)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, batch, np.int32(count))
        float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    analysis = compiled.memory_analysis()
    assert analysis is not None
    temporary = analysis.temp_size_in_bytes / 2**20
    milliseconds = 1e3 * statistics.median(seconds[1:])
    return {"tokens": float(table.lengths().sum()), "milliseconds": milliseconds, "temporary_mb": temporary}


def plot(found: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Draws time and memory against each axis, and a line of what is proportional to it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    grid: Any = figure.subplots(2, len(found), squeeze=False)
    for column, (axis, rows) in enumerate(found.items()):
        x = np.array([row[axis] for row in rows])
        for line, (key, label) in enumerate((("milliseconds", "ms a step"), ("temporary_mb", "temporary MB"))):
            y = np.array([row[key] for row in rows])
            grid[line, column].plot(x, y, "o-")
            grid[line, column].plot(x, y[0] * x / x[0], ":", color="grey", label="proportional")
            grid[line, column].set(xlabel=axis, ylabel=label, xscale="log", yscale="log")
    grid[0, 0].legend()
    figure.savefig(file)
