"""Several processes as one program: how they meet, what they agree on, and who writes."""

import contextlib
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpo_jax.errors import UserError

HOW = "give auto (Slurm, Cloud TPU, GKE, Open MPI) or HOST:PORT,PROCESSES,INDEX"
HEARTBEAT = 60  # seconds of silence after which a process counts as dead, and ends all others
MEETING = 300  # seconds for all to arrive
LOST = ("Gloo", "NCCL", "oordination service", "onnection reset", "peer")  # in errors after another process has ended


def initialize(how: str) -> None:
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
        print(f"dpo-jax: {process_prefix()}another process has ended, and says why ({reason})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    exit_now(1)


def process_prefix() -> str:
    """Returns which of the processes this is, to stand before a message."""
    return f"process {jax.process_index()}: "


def is_distributed() -> bool:
    """Returns whether this process is one of several."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Returns whether this is the process that writes and talks."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Returns host copies of arrays whose parts may lie on the devices of all processes, all of which must call it."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def all_agree(flag: bool) -> bool:
    """Returns whether the flag is true in every process, all of which must call it."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag)))) if is_distributed() else flag


def broadcast_from_primary(value: int) -> int:
    """Returns the value of the first process in every process, all of which must call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if is_distributed() else value


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Runs its body in the first process, then in the others, who may find what the first has made."""
    if not is_primary():
        barrier(name)
    yield
    if is_primary():
        barrier(name)


def assert_same_everywhere(what: Mapping[str, str]) -> None:
    """Compares texts, by name, with the first process's.

    Raises:
      UserError: one differs; in every process.
    """
    if not is_distributed():
        return
    digests = np.array([zlib.crc32(text.encode()) for text in what.values()], np.uint32)
    everywhere = multihost_utils.process_allgather(digests)
    for index, name in np.argwhere(everywhere != everywhere[0]):
        raise UserError(f"process {index} has another {list(what)[name]} than process 0; give all the same")


def barrier(name: str) -> None:
    """Waits until all processes have come here."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def exit_now(code: int) -> Any:
    """Ends a process that failed at once: its exit handlers would wait for the others, who may be waiting for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


MAX_CONCURRENT = 4


def concurrent_programs() -> int:
    """Returns how many small programs are run at a time: one, but on a processor that is one device."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return min(MAX_CONCURRENT, os.cpu_count() or 1) if alone else 1


def run_concurrently(
    tasks: Iterable[Callable[[], object]], count: int, stop: Callable[[], object] = lambda: None
) -> None:
    """Runs tasks, `count` at a time, and returns when all have ended; tasks may be made while others run.

    When one fails, or Ctrl-C is pressed, those that wait never start, and the error is raised when those that run have
    ended; `stop` is called before, so that they can end soon.
    """
    if count == 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(count) as pool:
        try:
            for done in as_completed([pool.submit(task) for task in tasks]):
                done.result()
        finally:  # when all have ended, it does nothing
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
