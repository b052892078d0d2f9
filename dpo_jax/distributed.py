"""Multi-process helpers (barriers, agreement checks, process-0 output), and a pool of threads."""

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

HOW = "set auto (Slurm, Cloud TPU, GKE, Open MPI) or HOST:PORT,PROCESSES,INDEX"
HEARTBEAT = 60  # seconds without a heartbeat after which a process counts as dead and all others end
START_TIMEOUT = 300  # seconds for all processes to connect
LOST = ("Gloo", "NCCL", "oordination service", "onnection reset", "peer")  # in errors after another process ended


def initialize(how: str) -> None:
    """Connects this process to the others of a distributed run. Call it before JAX accesses its devices.

    Args:
      how: "auto" (the machine's scheduler tells JAX the processes), or "HOST:PORT,PROCESSES,INDEX": the address of
        process 0, the number of processes, and the index of this one.

    Raises:
      UserError: `how` is invalid, or not all processes connected in time.
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
        jax.distributed.initialize(**where, initialization_timeout=START_TIMEOUT, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--distributed {how}: the processes could not connect ({reason}); {HOW}") from e
    sys.excepthook = _end_with_reason


def _end_with_reason(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ends this process; prints one line if the cause is the end of another process, else the traceback."""
    if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in LOST):
        reason = str(error).strip().splitlines()[0]
        print(f"dpo-jax: {process_prefix()}another process ended; see its message ({reason})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    exit_now(1)


def process_prefix() -> str:
    """Returns the prefix of this process's messages, `process INDEX: `."""
    return f"process {jax.process_index()}: "


def is_distributed() -> bool:
    """Returns whether there are several processes."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Returns whether this is process 0, which writes files and logs."""
    return jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Returns host copies of arrays that may be sharded over processes. Call it from all processes."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def all_agree(flag: bool) -> bool:
    """Returns whether the flag is true in every process. Call it from all processes."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag)))) if is_distributed() else flag


def broadcast_from_primary(value: int) -> int:
    """Returns the value of process 0. Call it from all processes."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if is_distributed() else value


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Runs the body on process 0 first, then on the others (which then hit the cache)."""
    if not is_primary():
        barrier(name)
    yield
    if is_primary():
        barrier(name)


def assert_same_everywhere(what: Mapping[str, str]) -> None:
    """Checks that all processes have the same texts. Call it from all processes.

    Args:
      what: name, for the message -> text.

    Raises:
      UserError: a text differs between processes; raised in every process.
    """
    if not is_distributed():
        return
    digests = np.array([zlib.crc32(text.encode()) for text in what.values()], np.uint32)
    everywhere = multihost_utils.process_allgather(digests)
    for index, name in np.argwhere(everywhere != everywhere[0]):
        raise UserError(f"process {index}: {list(what)[name]} differs from process 0; give all processes the same")


def barrier(name: str) -> None:
    """Waits until all processes have reached the barrier of that name."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def exit_now(code: int) -> Any:
    """Ends a failed process immediately, without its exit handlers.

    Those would wait for the other processes, which may be waiting for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


MAX_CONCURRENT = 4


def concurrent_programs() -> int:
    """Returns the number of small programs to run at a time: several on a CPU that is a single device, else one."""
    single_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return min(MAX_CONCURRENT, os.cpu_count() or 1) if single_cpu else 1


def run_concurrently(
    tasks: Iterable[Callable[[], object]], count: int, stop: Callable[[], object] = lambda: None
) -> None:
    """Runs tasks in threads, `count` at a time; returns when all have ended.

    When a task fails, or on Ctrl-C, waiting tasks never start; running tasks end first, then the error is raised.

    Args:
      tasks: the tasks; the iterable is consumed while tasks run.
      count: number of threads; 1 runs the tasks in this thread.
      stop: called after a failure, to make running tasks end soon.
    """
    if count == 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(count) as pool:
        try:
            for done in as_completed([pool.submit(task) for task in tasks]):
                done.result()
        finally:  # has no effect when all tasks have ended
            stop()
            pool.shutdown(wait=False, cancel_futures=True)
