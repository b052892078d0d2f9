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
# What attention has to do: head dims of released models, grouped queries; in `SPECIAL` a cap, sinks and windows.
HEADS = {
    "64": {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
    "80": {"head_dim": 80, "num_attention_heads": 4, "num_key_value_heads": 4},
    "128, grouped": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2},
    "256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}
SMALL = {"model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
GEMMA2 = {**SMALL, "model_type": "gemma2", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
GEMMA2 |= {"sliding_window": 64, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0}
GPT_OSS = {**SMALL, "model_type": "gpt_oss", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
GPT_OSS |= {"sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
SPECIAL = {"64, cap and window": GEMMA2, "64, sinks and window": GPT_OSS}
OWN_KERNELS = ("flash", "blocks")
LLAMA_1B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192}
LLAMA_1B |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
TOLERANCE = 0.1  # by which the peak of memory may differ from the plan
SHOWN = 12  # operations of the profile


def check_kernels(out: Path, tiny: bool) -> bool:
    """Compares every kernel of this device with attention without one, for each kind of head and dtype.

    A tiny check on a CPU interprets the kernels of `flash` for TPUs and GPUs.
    """
    from dpo_jax.models.families.registry import architecture_of
    from dpo_jax.models.kernels import KERNELS
    from dpo_jax.training.attention_check import kernel_refusal

    platform = jax.default_backend()
    found = interpreted_kernels() if tiny and platform == "cpu" else []
    kinds: dict[str, dict[str, Any]] = {name: SMALL | heads for name, heads in HEADS.items()} | SPECIAL
    for name, kernel in KERNELS.items():
        if platform not in kernel.platforms:
            continue
        for kind, config in kinds.items():
            for dtype in kernel.dtypes:
                why = kernel_refusal(name, architecture_of(config), dtype)
                found.append({"kernel": name, "heads": kind, "dtype": dtype, "refused": why})
                print(f"{name:8} heads of {kind:20} {dtype:9} {why or 'equal'}", flush=True)
    faults = kernel_faults(found)
    (out / "kernels.json").write_text(json.dumps({"kernels": found, "faults": faults}, indent=1))
    for line in faults:
        print(f"fault: {line}")
    return not faults


def kernel_faults(found: list[dict[str, Any]]) -> list[str]:
    """Returns a line for each kernel that gives other numbers than chunks, or fails.

    A library's kernel may lack something, and says so before it is tried or by a NotImplementedError; ours may not
    raise that, as Pallas does for what it cannot compile.
    """
    faults = []
    for one in found:
        why = one["refused"]
        lacks = "NotImplementedError" in why and one["kernel"] not in OWN_KERNELS
        if "differs" in why or ("fails" in why and not lacks):
            where = f", interpreted for a {one['interpreted']}" if "interpreted" in one else ""
            faults.append(f"{one['kernel']}{where}, heads of {one['heads']}, {one['dtype']}: {why}")
    return faults


def interpreted_kernels() -> list[dict[str, Any]]:
    """Compares the kernels of `flash` on a CPU, which interprets them; results as those of `check_kernels`."""
    from dpo_jax.models.families.registry import architecture_of
    from dpo_jax.models.flash import PLATFORMS, flash_attention
    from dpo_jax.training.attention_check import kernel_mismatch

    found = []
    for platform in PLATFORMS:
        attend: Any = partial(flash_attention, platform=platform, interpret=True)
        for kind, config in SPECIAL.items():
            why = kernel_mismatch(attend, architecture_of(config), "float32")
            one = {"kernel": OWN_KERNELS[0], "interpreted": platform, "heads": kind, "dtype": "float32", "refused": why}
            found.append(one)
            print(f"{OWN_KERNELS[0]} of a {platform}, interpreted, heads of {kind}: {why or 'equal'}", flush=True)
    return found


def run_config(folder: Path, tiny: bool) -> Any:
    """Returns the config of a run of a Llama of random weights: 1.1B parameters, or tiny."""
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
        "model.remat": "none" if tiny else "dots",  # auto depends on the device's memory, and plans another program
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
    """Trains three steps and compares the peak of memory with the largest program that is planned for that run."""
    from dpo_jax.training.loop import train_run
    from dpo_jax.training.setup import setup_run

    with tempfile.TemporaryDirectory() as name:
        config = run_config(Path(name), tiny)
        planned = planned_bytes(config)
        train_run(setup_run(config))
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    fits, line = peak_verdict(planned, peak)
    (out / "memory.json").write_text(json.dumps({"planned": planned, "peak": peak}, indent=1))
    print("planned, GiB:", {name: round(size / 2**30, 3) for name, size in planned.items()}, line, sep="\n")
    return fits


def planned_bytes(config: Any) -> dict[str, int]:
    """Returns the bytes on each device that a run's programs need: its step, and the reference's pass before it."""
    from dpo_jax.training import lower
    from dpo_jax.training.plan import plan_run

    found = {"step": plan_run(config).memory.total}
    program = lower.compile_program(lower.lower_reference(lower.planned_run(config, None)))
    if isinstance(program, lower.TooLarge):
        return found | {"reference": program.bytes}
    needs = program.memory_analysis()
    lasting = needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes
    temporary = lower.temporary_bytes(needs, lower.planned_platform(None))
    return found | {"reference": lasting + temporary + needs.generated_code_size_in_bytes}


def peak_verdict(planned: dict[str, int], peak: int | None) -> tuple[bool, str]:
    """Returns whether a peak is within `TOLERANCE` of the largest planned program, and a line about it.

    A device that does not tell its peak, as a CPU, passes.
    """
    name, largest = max(planned.items(), key=lambda one: one[1])
    if peak is None:
        return True, "this device does not tell its peak; nothing to compare"
    off = peak / largest - 1
    return abs(off) <= TOLERANCE, f"peak {peak / 2**30:.2f} GiB, {off:+.1%} of the largest planned program, the {name}"


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
    # Others of "/device:" have no operations: libtpu adds one, whatever the device is.
    device = [plane for plane in planes if plane.name.startswith(("/device:GPU:", "/device:TPU:"))]
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
