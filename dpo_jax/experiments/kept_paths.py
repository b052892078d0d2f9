"""Paths of the losses of a leaderboard, kept in files, so that an interrupted run goes on with the missing losses.

A file is one of everything that its numbers depend on: the loss, strengths, worlds, steps, and the code.
"""

import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import losses, records
from dpo_jax.experiments import fitted, leaderboard, optimum, table_world
from dpo_jax.experiments.leaderboard import LossPaths, run_loss
from dpo_jax.experiments.table_world import TableWorld
from dpo_jax.losses.registry import find_entry
from dpo_jax.named import fingerprint
from dpo_jax.paths import read_checked, write_checked
from dpo_jax.records import Array

log = logging.getLogger(__name__)
ARITHMETIC = ("jax_enable_x64", "jax_default_matmul_precision")  # settings of JAX that change numbers
MODULES = (fitted, leaderboard, optimum, records, table_world)  # whose code paths depend on, beside the losses'


def run_kept(
    folder: Path, term: Mapping[str, Any], betas: Sequence[float], worlds: Sequence[TableWorld], steps: Array
) -> LossPaths:
    """Returns what `run_loss` does, from a file of the folder if it is there, bit for bit; else writes the file."""
    file = folder / f"{part_name(term, betas, worlds, steps)}.npz"
    if (content := read_checked(file)) is not None:
        log.info(f"{file}: kept from an earlier run")
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            strengths, *arrays = (stored[name] for name in LossPaths._fields)
            return LossPaths(tuple(strengths.tolist()), *arrays)
    found, buffer = run_loss(term, betas, worlds, steps), io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: np.asarray(value) for name, value in found._asdict().items()})
    write_checked(file, buffer.getvalue())
    return found


def part_name(term: Mapping[str, Any], betas: Sequence[float], worlds: Sequence[TableWorld], steps: Array) -> str:
    """Returns the name of a loss, and a hash of all that its paths depend on."""
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")]
    places = [jax.default_backend(), jax.devices()[0].device_kind]
    numerics = [os.environ.get("XLA_FLAGS", ""), *(getattr(jax.config, name) for name in ARITHMETIC)]
    arrays = [np.ascontiguousarray(array) for array in jax.tree.leaves(list(worlds))]
    kinds = [(array.shape, array.dtype.name) for array in arrays]
    own = fingerprint(find_entry(term["name"]))  # its statistic too
    head = [sorted(term.items()), list(betas), steps.tolist(), own, versions, places, numerics, kinds]
    digest = hashlib.blake2b(json.dumps(head, default=str).encode(), digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    for source in [*sorted(Path(inspect.getfile(losses)).parent.glob("*.py")), *map(inspect.getfile, MODULES)]:
        digest.update(Path(source).read_bytes())
    name = "".join(letter if letter.isalnum() else "_" for letter in term["name"])
    return f"{name}-{digest.hexdigest()}"
