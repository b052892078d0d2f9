"""Whole runs, as a user would start them: from text and a model folder to a trained model folder, start-up included.

Run by scripts/bench --epoch, which calls `_bench_epoch.py FOLDER BATCH_SIZE DTYPE` for TRL's part; the folder holds
`model/` and `rows.jsonl`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _bench_list import BETA, CLIP, LEARNING_RATE, MAX_LENGTH, System
from _bench_systems import trl_options

HERE = Path(__file__).resolve().parent


def epochs(folder: Path, count: int, batch_size: int, dtypes: list[str]) -> list[dict[str, Any]]:
    """Times one epoch over `count` comparisons in each system and dtype, prints and returns the seconds."""
    with (folder / "rows.jsonl").open() as f:
        lines = [line for line, _ in zip(f, range(count), strict=False)]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "one.jsonl").write_text(lines[0])
    found = []
    for dtype in dtypes:
        ours = our_command(folder, batch_size, dtype)
        theirs = [sys.executable, str(HERE / "_bench_epoch.py"), str(folder), str(batch_size), dtype]
        seconds = {name: timed(c, folder) for name, c in (("dpo_jax", ours), ("TRL", theirs), ("again", ours))}
        found.append({"dtype": dtype, "comparisons": count, **seconds})
        print(
            f"an epoch of {count} comparisons in {dtype}: dpo_jax {seconds['dpo_jax']:.1f} s ({seconds['again']:.1f} s "
            f"when run again, with its caches), TRL {seconds['TRL']:.1f} s; {seconds['TRL'] / seconds['dpo_jax']:.2f}x"
        )
    return found


def timed(command: list[str], folder: Path) -> float:
    """Returns the seconds that a process takes; one that fails ends the bench."""
    environment = os.environ | {"DPO_JAX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"bench: {' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return time.perf_counter() - start


def our_command(folder: Path, batch_size: int, dtype: str) -> list[str]:
    """Returns `dpo-jax train` on those rows; every call gets a run folder of its own."""
    options = {
        "run": folder / f"run-{time.monotonic_ns()}",
        "data.path": folder / "rows.jsonl",
        "data.eval-path": folder / "one.jsonl",
        "data.max-length": MAX_LENGTH,
        "data.truncation": "keep_start",
        "model.path": folder / "model",
        "model.compute": dtype,
        "loss.beta": BETA,
        "optim.learning-rate": LEARNING_RATE,
        "optim.warmup-steps": 0,
        "optim.max-grad-norm": CLIP,
        "samples.prompts": 0,
        "eval-every": 0,
        "batch-size": batch_size,
    }
    config = folder / "epoch.yaml"
    config.write_text("loss: {name: dpo}\noptim: {name: adamw}\n")
    values = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    return [sys.executable, "-m", "dpo_jax", "train", str(config), *values]


def train_with_trl(folder: Path, batch_size: int, dtype: str) -> None:
    """Trains as TRL's documentation does; its defaults but for what must be equal."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    system = System("TRL", dtype, checkpointing=dtype == "bfloat16")
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "arrow"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    config = DPOConfig(**trl_options(folder, system, batch_size))
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder / "trl" / "model"))


def write_rows(folder: Path, comparisons: list[Any]) -> None:
    """Writes comparisons as the lines that both read."""
    names = ("prompt", "chosen", "rejected")
    lines = [json.dumps(dict(zip(names, (c.prompt, *c.responses), strict=True))) for c in comparisons]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))


if __name__ == "__main__":
    where, size, compute = sys.argv[1:]
    train_with_trl(Path(where), int(size), compute)
