"""Direct Preference Optimization (arXiv 2305.18290) in JAX and Flax.

Three levels, each usable without the ones above:

- losses: `dpo_jax.losses.dpo(Logps.of(policy, reference), beta=0.1)`, pure functions of log-probs;
- functions: `load_model`, `init_model`, `tokenize`, `collate`, `sequence_logps`, `make_train_step`, `generate`,
  `save_model`;
- runs: `train`, `evaluate`, `sample`, `sweep`, as the commands of `dpo-jax`.

Names are imported when they are first used, so that `import dpo_jax` is fast and touches no device.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dpo_jax.libtpu import quiet_libtpu

quiet_libtpu()  # before JAX looks for devices
__version__ = "0.1.0"

if TYPE_CHECKING:
    from dpo_jax import losses
    from dpo_jax.config.schema import Config
    from dpo_jax.data.collate import collate, tokenize
    from dpo_jax.data.table import Table
    from dpo_jax.data.unpack import unpack
    from dpo_jax.errors import UserError
    from dpo_jax.logprobs import sequence_logps
    from dpo_jax.losses.objective import Loss
    from dpo_jax.models.huggingface.load import init_model, load_model, save_model
    from dpo_jax.models.interface import Model
    from dpo_jax.records import Batch, Logps, TrainState
    from dpo_jax.reference import with_reference
    from dpo_jax.runs.evaluate import evaluate
    from dpo_jax.runs.sample import sample
    from dpo_jax.runs.sweep import sweep
    from dpo_jax.runs.train import Result, train
    from dpo_jax.sampling import generate
    from dpo_jax.step import init_state, make_eval_step, make_train_step

_HOME = {
    "config.schema": ("Config",),
    "data.collate": ("collate", "tokenize"),
    "data.table": ("Table",),
    "data.unpack": ("unpack",),
    "errors": ("UserError",),
    "logprobs": ("sequence_logps",),
    "losses": ("Logps", "Loss"),  # which lets jit and grad pass missing fields
    "models.huggingface.load": ("init_model", "load_model", "save_model"),
    "models.interface": ("Model",),
    "records": ("Batch", "TrainState"),
    "reference": ("with_reference",),
    "runs.evaluate": ("evaluate",),
    "runs.sample": ("sample",),
    "runs.sweep": ("sweep",),
    "runs.train": ("Result", "train"),
    "sampling": ("generate",),
    "step": ("init_state", "make_eval_step", "make_train_step"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Batch",
    "Config",
    "Logps",
    "Loss",
    "Model",
    "Result",
    "Table",
    "TrainState",
    "UserError",
    "collate",
    "evaluate",
    "generate",
    "init_model",
    "init_state",
    "load_model",
    "losses",
    "make_eval_step",
    "make_train_step",
    "sample",
    "save_model",
    "sequence_logps",
    "sweep",
    "tokenize",
    "train",
    "unpack",
    "with_reference",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("dpo_jax.losses")
    if name not in _MODULE:
        raise AttributeError(f"module 'dpo_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dpo_jax.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
