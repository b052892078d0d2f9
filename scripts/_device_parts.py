"""Parts of scripts/device_check that run in this project alone: kernels, memory, profile.

    _device_parts.py PART FOLDER [--tiny]

Prints its results, writes FOLDER/PART.json, and exits with 1 if a check fails.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).resolve().parent
# What attention has to do: head dims of released models, grouped queries, a cap, a window.
HEADS = {
    "64": {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 4},
    "128, grouped": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2},
    "256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}
SMALL = {"model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
GEMMA2 = {**SMALL, "model_type": "gemma2", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
GEMMA2 |= {"sliding_window": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0}
LLAMA_1B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192}
LLAMA_1B |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
TOLERANCE = 0.1  # by which the peak of memory may differ from the plan
SHOWN = 12  # operations of the profile


def check_kernels(out: Path, tiny: bool) -> bool:
    """Compares every kernel of this device with attention without one, for each kind of head and dtype.

    A tiny check on a CPU interprets the kernels of `flash` for TPUs and GPUs, with a cap, with and without a window.
    """
    from dpo_jax.models.families.registry import architecture_of
    from dpo_jax.models.kernels import KERNELS
    from dpo_jax.training.attention_check import kernel_refusal

    platform, found = jax.default_backend(), []
    kinds: dict[str, dict[str, Any]] = {name: SMALL | heads for name, heads in HEADS.items()}
    kinds["64, cap and window"] = GEMMA2
    if tiny and platform == "cpu":
        found = interpreted_kernels()
    for name, kernel in KERNELS.items():
        if platform not in kernel.platforms:
            continue
        for kind, config in kinds.items():
            for dtype in kernel.dtypes:
                why = kernel_refusal(name, architecture_of(config), dtype)
                found.append({"kernel": name, "heads": kind, "dtype": dtype, "refused": why})
                print(f"{name:8} heads of {kind:20} {dtype:9} {why or 'equal'}", flush=True)
    if not found:
        print(f"no kernel runs on a {platform}; attention runs in chunks")
    (out / "kernels.json").write_text(json.dumps(found, indent=1))
    # A kernel may say that it lacks something. One that gives other numbers, or fails when interpreted, is a fault.
    return not any("differs" in one["refused"] or ("interpreted" in one and one["refused"]) for one in found)


def interpreted_kernels() -> list[dict[str, Any]]:
    """Compares the kernels of `flash` on a CPU, which interprets them; results as those of `check_kernels`."""
    from dpo_jax.models.families.registry import architecture_of
    from dpo_jax.models.flash import PLATFORMS, flash_attention
    from dpo_jax.training.attention_check import kernel_mismatch

    found = []
    for platform in PLATFORMS:
        attend: Any = partial(flash_attention, platform=platform, interpret=True)
        why = kernel_mismatch(attend, architecture_of(GEMMA2), "float32")
        found.append({"kernel": "flash", "interpreted": platform, "refused": why})
        print(f"flash of a {platform}, interpreted, a cap, with and without a window: {why or 'equal'}", flush=True)
    return found


def run_config(folder: Path, tiny: bool) -> Any:
    """Returns the config of a run of a Llama of random weights: 1.2B parameters, or tiny."""
    from dpo_jax.config.parse import parse_config
    from dpo_jax.config.schema import Config

    sizes = SMALL | {"num_attention_heads": 4} if tiny else LLAMA_1B
    (folder / "model.json").write_text(json.dumps(sizes))
    (folder / "c.yaml").write_text("data: {name: files}\nloss: {name: dpo}\noptim: {name: adamw}\n")
    count = 32 if tiny else 1024
    words = ["the", "film", "is", "not", "good", "and", "it", "was", "a", "very", "long", "story", "of"]
    draws = iter(np.random.default_rng(0).integers(0, len(words), 300 * count).tolist())
    texts = {"prompt": 40, "chosen": 120, "rejected": 120}
    rows = ({name: " ".join(words[next(draws)] for _ in range(n)) for name, n in texts.items()} for _ in range(count))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model.config": folder / "model.json",
        "model.tokenizer": "synthetic",
        "data.path": folder / "rows.jsonl",
        "data.eval-path": folder / "rows.jsonl",
        "data.eval-examples": 8,
        "model.compute": "float32" if tiny else "bfloat16",
        "data.row-length": 512 if tiny else 2048,
        "data.rows": 1 if tiny else 4,
        "batch-size": 8 if tiny else 256,
        "max-steps": 3,
        "eval-every": 0,
        "samples.prompts": 0,
        "run": folder / "run",
    }
    texts = [str(text) for key, value in options.items() for text in (f"--{key}", value)]
    return parse_config(Config, str(folder / "c.yaml"), texts, prog="device_check")


def check_memory(out: Path, tiny: bool) -> bool:
    """Trains three steps and compares the peak of memory on the device with the plan of that run."""
    from dpo_jax.training.loop import train_run
    from dpo_jax.training.plan import plan_run
    from dpo_jax.training.setup import setup_run

    with tempfile.TemporaryDirectory() as name:
        config = run_config(Path(name), tiny)
        planned = plan_run(config).memory
        train_run(setup_run(config))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    result = {"planned": planned._asdict() | {"total": planned.total}, "peak": peak}
    (out / "memory.json").write_text(json.dumps(result, indent=1))
    print(f"planned {planned.total / 2**30:.2f} GiB:", {k: round(v / 2**30, 2) for k, v in planned._asdict().items()})
    if peak is None:
        print("this device does not tell its peak; nothing to compare")
        return True
    print(f"peak {peak / 2**30:.2f} GiB, {peak / planned.total - 1:+.1%} of the plan")
    return abs(peak / planned.total - 1) <= TOLERANCE


def profile(out: Path, tiny: bool) -> bool:
    """Traces one train step; prints its duration and the operations that take most of it."""
    from dpo_jax import Table, collate, init_model, init_state, losses, make_train_step, optim
    from dpo_jax.records import Tokens
    from dpo_jax.training.attention_check import with_attention

    sizes, dtype = (SMALL | {"num_attention_heads": 4}, "float32") if tiny else (LLAMA_1B, "bfloat16")
    model, params = init_model(sizes, compute=dtype, remat="none" if tiny else "dots")
    model, note = with_attention(model, "auto", dtype)
    rng = np.random.default_rng(0)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 256, rng.integers(low, high)).astype(np.int32)

    table = Table.of(Tokens(ids(32, 128), (ids(16, 200), ids(16, 200))) for _ in range(8 if tiny else 64))
    batch, count = collate(table, range(len(table)))
    loss, tx = losses.build("simpo"), optim.build("rmsprop", learning_rate=1e-6)
    step = jax.jit(make_train_step(model, loss, tx), donate_argnums=0)
    state, batch = jax.jit(lambda p: init_state(p, tx, loss))(params), jax.device_put(batch)
    for _ in range(2):
        state, _ = step(state, batch, jnp.int32(count))
    jax.block_until_ready(state)
    with jax.profiler.trace(str(out / "trace")):
        start = time.perf_counter()
        state, metrics = step(state, batch, jnp.int32(count))
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - start
    print(note or "attention: chunks")
    print(f"one step of {len(table)} comparisons: {1e3 * seconds:.1f} ms; the operations that take most of it:")
    found = operation_seconds(out / "trace")
    total = sum(found.values())
    for name, spent in found.most_common(SHOWN):
        print(f"{spent / total:7.1%} {1e3 * spent:9.3f} ms  {name[:90]}")
    (out / "profile.json").write_text(json.dumps({"seconds": seconds, "operations": dict(found.most_common(200))}))
    return bool(found)


def operation_seconds(folder: Path) -> Counter[str]:
    """Returns name -> seconds of the operations in the newest trace below a folder: of the first device, or the CPU."""
    from jax.profiler import ProfileData

    newest = max(folder.rglob("*.xplane.pb"), key=os.path.getmtime)
    planes = list(ProfileData.from_file(str(newest)).planes)
    device = [plane for plane in planes if plane.name.startswith("/device:")]
    plane = device[0] if device else next(plane for plane in planes if plane.name == "/host:CPU")
    # "XLA Ops" repeats what the streams of a GPU have, by operation; a CPU has threads.
    lines = [line for line in plane.lines if line.name == "XLA Ops"] or [
        line for line in plane.lines if line.name.startswith(("Stream", "tf_XLA"))
    ]
    found: Counter[str] = Counter()
    for line in lines:
        for event in line.events:
            if "::" not in event.name:  # of the runtime, which waits for the operations
                found[event.name] += event.duration_ns / 1e9
    return found


PARTS = {"kernels": check_kernels, "memory": check_memory, "profile": profile}


if __name__ == "__main__":
    part, target, *rest = sys.argv[1:]
    sys.exit(0 if PARTS[part](Path(target), "--tiny" in rest) else 1)
