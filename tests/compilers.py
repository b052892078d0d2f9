"""The compilers of accelerators that are not here: libtpu, and CUDA's where it is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.paths import cache_folder
from dpo_jax.training import lower
from dpo_jax.training.targets import parse_target

ROOT = Path(__file__).parent.parent
CUDA = cache_folder() / "cuda-compiler"  # where scripts/targets installs it; tests have a cache of their own later
HAS_TPU = bool(os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu"))
LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
LLAMA |= {"intermediate_size": 384, "max_position_embeddings": 4096, "tie_word_embeddings": False}

tpu_compiler = pytest.mark.skipif(
    not HAS_TPU, reason="TPUs' compiler is not installed (dpo_jax[aot-tpu], or TPU_LIBRARY_PATH)"
)


def cuda_folder() -> str:
    """Returns the folder of CUDA's compiler, "" if it is installed with JAX; skips the test without one."""
    try:
        if importlib.util.find_spec("jax_plugins.xla_cuda13"):
            return ""
    except ModuleNotFoundError:
        pass
    if not (CUDA / "jax_plugins").is_dir():
        pytest.skip(f"CUDA's compiler is not installed (dpo_jax[aot-gpu], or by scripts/targets in {CUDA})")
    return str(CUDA)


def by_cuda(code: str) -> str:
    """Returns what a Python program prints that can compile for GPUs. It may import the tests."""
    paths = [str(ROOT), str(ROOT / "tests"), cuda_folder(), os.environ.get("PYTHONPATH", "")]
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False,
        env=kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def planned_texts(folder: Path, target: str, *options: str, model: Mapping[str, object] = LLAMA) -> tuple[str, str]:
    """Returns the train step and the reference's pass of a run, compiled for a target.

    Args:
      folder: for the model's config.json.
      target: as for `dpo-jax plan`.
      options: of the run.
      model: its config.json.
    """
    (folder / "config.json").write_text(json.dumps(model))
    fixed = ["--model.config", str(folder / "config.json"), "--model.compute", "bfloat16", "--model.remat", "full"]
    config = parse_config(Config, None, [*fixed, *options], prog="x")
    planned = lower.planned_run(config, parse_target(target))
    first, second = (made(planned).compile().as_text() for made in (lower.lower_step, lower.lower_reference))
    return first or "", second or ""


def shapes_in(text: str) -> set[tuple[int, ...]]:
    """Returns the shapes of all arrays in a program."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d*\w*\[([\d,]+)\]", text)}
