"""How much memory training takes, whole or by adapters, beside what `dpo-jax plan` says; and loading and saving.

Run by scripts/bench --memory, which calls `_bench_memory.py train ARGUMENTS` and `_bench_memory.py folder FOLDER` for
each figure, so that every peak is of a process of its own. Peaks are counted from when everything is imported.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _bench_epoch import our_command
from _bench_systems import peak_rss_mb

HERE = Path(__file__).resolve().parent
SHAPE = ("--max-steps", "2", "--data.row-length", "1024", "--data.rows", "1")
LORA = ("--lora.rank", "16")
WAYS = {
    "all parameters": (),
    "LoRA, rank 16": LORA,
    "LoRA over int8": (*LORA, "--lora.base", "int8"),
    "LoRA over nf4": (*LORA, "--lora.base", "nf4"),
}
LLAMA_1B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192}
LLAMA_1B |= {"num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}


def memory(folder: Path, batch_size: int) -> list[dict[str, Any]]:
    """Measures and prints each way to train, in MB, then a folder of 1.24B parameters in bfloat16."""
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)[: 2 * batch_size]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "one.jsonl").write_text(lines[0])
    found = []
    for name, options in WAYS.items():
        command = [*our_command(folder, batch_size, "float32")[4:], *SHAPE, *options]
        measured = {}
        for _ in range(2):  # the second finds the compiled program, whose making takes memory too
            command[command.index("--run") + 1] = str(folder / f"run-{os.urandom(4).hex()}")
            measured = _child(folder, "train", *command)
        found.append({"way": name, **measured, **_child(folder, "plan", *command)})
        peak, planned = found[-1]["peak_mb"], found[-1]["planned_mb"]
        print(f"{name:<18}{peak:>8.0f} MB at the peak, planned {planned:.0f}", flush=True)
    found.append(_child(folder, "folder", str(folder)))
    one = found[-1]
    print(f"a folder of {one['parameters']:,} parameters in bfloat16, {one['held_mb']:.0f} MB")
    print(f"beside them loading takes {one['load_mb']:.0f} MB, saving {one['save_mb']:.0f} MB")
    return found


def _child(folder: Path, *command: str) -> dict[str, Any]:
    """Returns what a process of its own has measured; one that fails ends the bench."""
    environment = os.environ | {"DPO_JAX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    whole = [sys.executable, str(HERE / "_bench_memory.py"), *command]
    done = subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"bench: {' '.join(whole)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_anew() -> float:
    """Returns the memory of this process in MB, which from now on is its greatest so far."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss_mb()


def train(argv: list[str]) -> dict[str, float]:
    """Trains as the command line does; returns the greatest memory beside what the imports took."""
    import jax

    from dpo_jax import cli

    jax.devices()
    before = _peak_anew()
    cli.run_command(["train", *argv])
    return {"peak_mb": peak_rss_mb() - before}


def planned(argv: list[str]) -> dict[str, float]:
    """Returns what the plan of the same run says."""
    from dpo_jax.config.parse import parse_config
    from dpo_jax.config.schema import Config
    from dpo_jax.training.plan import plan_run

    made = plan_run(parse_config(Config, argv[0], argv[1:], prog="bench"))
    return {"planned_mb": made.memory.total / 2**20, **{k: v / 2**20 for k, v in made.memory._asdict().items()}}


def folder(path: str) -> dict[str, float]:
    """Returns what loading and saving a model of 1.24B parameters takes beside what is held of it."""
    import jax
    import ml_dtypes
    import numpy as np

    from dpo_jax import sharding
    from dpo_jax.models.families.registry import architecture_of
    from dpo_jax.models.huggingface.folder import open_folder, save_folder
    from dpo_jax.models.huggingface.lazy import narrow_dtypes
    from dpo_jax.models.model import build_model

    model = build_model(architecture_of(LLAMA_1B))
    shapes = jax.eval_shape(model.init, jax.eval_shape(jax.random.key, 0))
    save_folder(
        Path(path) / "1b",
        jax.tree.map(lambda x: np.zeros(x.shape, ml_dtypes.bfloat16), shapes),
        LLAMA_1B,
        dtype="bfloat16",
    )
    _, config, stored = open_folder(Path(path) / "1b")
    mesh = sharding.make_mesh()
    where = sharding.param_shardings(mesh, model.axes, shapes)
    before = _peak_anew()
    params = sharding.put_params(narrow_dtypes(stored), where)
    held = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20
    load = peak_rss_mb() - before - held
    before = _peak_anew()
    save_folder(Path(path) / "out", params, config)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    return {"parameters": count, "held_mb": held, "load_mb": load, "save_mb": peak_rss_mb() - before}


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    result = folder(*rest) if kind == "folder" else {"train": train, "plan": planned}[kind](rest)
    print(json.dumps(result))
