"""Several processes as one program: how they meet, what they agree on, and who writes."""

import os
import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.records import UserError

HOW = "give auto (Slurm, Cloud TPU, GKE, Open MPI) or HOST:PORT,PROCESSES,INDEX"
HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and ends all others
MEETING = 300  # seconds for all to arrive


def join(how: str) -> None:
    """Makes this process one of several that run one program; to be called before JAX has looked at its devices.

    Args:
      how: "auto", where the machine's scheduler says who and how many they are, or "HOST:PORT,PROCESSES,INDEX", the
        address of process 0, how many there are, and which of them this is.

    Raises:
      UserError: neither of both, or they did not all arrive.
    """
    where: dict[str, Any] = {}
    if how != "auto":
        try:
            address, count, index = how.split(",")
            where = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        except ValueError:
            raise UserError(f"--distributed {how}: {HOW}") from None
        if not 0 <= where["process_id"] < where["num_processes"] or ":" not in address:
            raise UserError(f"--distributed {how}: {HOW}, where INDEX counts from 0")
    try:
        jax.distributed.initialize(**where, initialization_timeout=MEETING, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--distributed {how}: the processes did not meet ({reason}); {HOW}") from e


def several() -> bool:
    """Returns whether this process is one of several."""
    return jax.process_count() > 1


def first() -> bool:
    """Returns whether this is the process that writes and talks."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Returns host copies of arrays whose parts may lie on the devices of all processes, all of which must call it."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def all_of(flag: bool) -> bool:
    """Returns whether the flag is true in every process, all of which must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag)))) if several() else flag


def meet(name: str) -> None:
    """Waits until all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def end(code: int) -> None:
    """Ends a process that failed at once: its exit handlers would wait for the others, who may be waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
