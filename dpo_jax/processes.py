"""Several processes as one program: how they meet, what they agree on, and who writes."""

import contextlib
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.records import UserError

HOW = "give auto (Slurm, Cloud TPU, GKE, Open MPI) or HOST:PORT,PROCESSES,INDEX"
HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and ends all others
MEETING = 300  # seconds for all to arrive
LOST = ("Gloo", "NCCL", "oordination service", "onnection reset", "peer")  # in errors after another process has ended


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
    sys.excepthook = _end_with_reason


def _end_with_reason(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends this process, with one line if all that happened is that another one did."""
    if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in LOST):
        reason = str(error).strip().splitlines()[0]
        print(f"dpo-jax: {name()}another process has ended, and says why ({reason})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    end(1)


def name() -> str:
    """Returns which of the processes this is, to stand before a message."""
    return f"process {jax.process_index()}: "


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


def of_first(value: int) -> int:
    """Returns the value of the first process in every process, all of which must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if several() else value


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Runs its body in the first process, then in the others, who may find what the first has made."""
    if not first():
        meet(name)
    yield
    if first():
        meet(name)


def check_same(what: Mapping[str, str]) -> None:
    """Compares texts, by name, with the first process's.

    Raises:
      UserError: one differs; in every process.
    """
    if not several():
        return
    digests = np.array([zlib.crc32(text.encode()) for text in what.values()], np.uint32)
    everywhere = multihost_utils.process_allgather(digests)
    for index, name in np.argwhere(everywhere != everywhere[0]):
        raise UserError(f"process {index} has another {list(what)[name]} than process 0; give all the same")


def meet(name: str) -> None:
    """Waits until all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)


def end(code: int) -> Any:
    """Ends a process that failed at once: its exit handlers would wait for the others, who may be waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
