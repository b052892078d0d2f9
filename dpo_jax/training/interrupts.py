"""Signals, hang watchdog, out-of-memory advice and the run-folder lock."""

import contextlib
import datetime
import faulthandler
import fcntl
import itertools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

import jax
from jax.experimental import multihost_utils

from dpo_jax import distributed
from dpo_jax.config.schema import DataConfig, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.paths import LOCK_FILE

EXIT_AGAIN = 75  # exit code: stopped early, everything saved; the same command resumes (EX_TEMPFAIL of sysexits.h)
EXIT_INTERRUPTED = 130  # exit code: stopped immediately by Ctrl-C
STOPPING = "stopping at the next step, or before the next run, with everything saved"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_sync_points = itertools.count(1)
_outer: list[Callable[[], str]] = []  # what `stop_requests` has yielded, while it is open
log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], str]]:
    """Yields a function to call after every step. It returns the reason to stop ("" for none), equal in all processes.

    Reasons are SIGTERM, the first Ctrl-C and, with several processes, a preemption notice to any of them. The second
    Ctrl-C stops the process immediately, even during a long compilation. Inside of another one, as the runs of a sweep
    are, the outer one's function is yielded: it remembers a request that came while a run was ending.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: ""
        return
    if _outer:
        yield _outer[0]
        return
    several, received = distributed.is_distributed(), list[str]()
    read, write = os.pipe()
    os.set_blocking(write, False)
    # With several processes JAX's preemption service handles SIGTERM and notifies all of them.
    before = {s: signal.signal(s, lambda *_: None) for s in SIGNALS if not (several and s == signal.SIGTERM)}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(read, received, several), daemon=True).start()
    _outer.append(_remembered(_preemption if several else lambda: "".join(received[:1])))
    try:
        yield _outer[0]
    finally:
        _outer.clear()
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)


def end_run(why: str, done: str) -> NoReturn:
    """Ends the process for a reason of `stop_requests`; `done` says what is complete.

    Raises:
      SystemExit: with `EXIT_AGAIN`.
    """
    log.info(f"asked to end ({why}): {done}; the same command goes on from there")
    raise SystemExit(EXIT_AGAIN)


def end_if_asked(done: str) -> None:
    """Ends the process outside of steps if several runs share `stop_requests` and it has a reason; see `end_run`."""
    if _outer and (why := _outer[0]()):
        end_run(why, done)


def _remembered(source: Callable[[], str]) -> Callable[[], str]:
    """Returns a function that keeps the first reason of `source`, which tells a preemption notice only once."""
    kept: list[str] = []

    def asked() -> str:
        if not kept and (why := source()):
            kept.append(why)
        return "".join(kept)

    return asked


def _preemption() -> str:
    """Returns the reason to stop if any process has received a signal or a preemption notice."""
    # The service needs a number that grows; the step starts again with every run of this program.
    stop = multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return "a signal or preemption notice to one of the processes" if stop else ""


def _listen(read: int, received: list[str], several: bool) -> None:
    """Appends signals to `received` as they arrive; a Python handler would wait for the end of a compilation."""
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while number := pipe.read(1):
            name = signal.Signals(number[0]).name
            if name == "SIGINT" and name in received:
                print("dpo-jax: stopped; the same command resumes from the last checkpoint", file=sys.stderr)
                distributed.exit_now(EXIT_INTERRUPTED)
            if name == "SIGINT":
                print(f"dpo-jax: {STOPPING}; press Ctrl-C again to stop now", file=sys.stderr)
            if several:
                os.kill(os.getpid(), signal.SIGTERM)
            received.append(name)


@contextlib.contextmanager
def hang_watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields a function that resets a timer; at `seconds` (0: never) the process prints all stacks and exits with 1.

    The timer counts its own ticks, so that it stands still while the process is stopped (SIGSTOP, a suspended job).
    """
    waited, ended, tick = [0.0], threading.Event(), min(1.0, seconds / 4)

    def watch() -> None:
        while not ended.wait(tick):
            waited[0] += tick
            if waited[0] >= seconds:
                file = sys.__stderr__ or sys.stderr
                print(f"Timeout ({datetime.timedelta(seconds=seconds)})!", file=file, flush=True)
                faulthandler.dump_traceback(file=file)
                distributed.exit_now(1)

    thread = threading.Thread(target=watch, daemon=True)

    def alive() -> None:
        waited[0] = 0.0
        if seconds and not thread.ident:
            thread.start()

    try:
        yield alive
    finally:
        ended.set()


@contextlib.contextmanager
def explain_out_of_memory(model: ModelConfig, data: DataConfig) -> Iterator[None]:
    """Turns an out-of-memory error of a device into a UserError that lists remedies."""
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        rows = "data.rows 1" if data.rows is None else f"data.rows below {data.rows}"
        remedies = [rows, *(["model.remat full"] if model.remat != "full" else [])]
        remedies += ["model.compute bfloat16"] if model.compute != "bfloat16" else []
        reason = str(e).strip().splitlines()[0]
        raise UserError(
            f"a device is out of memory ({reason}); set, in this order: {', '.join(remedies)}, more devices along "
            "mesh.fsdp, a shorter data.max_length; dpo-jax plan shows the memory of each choice"
        ) from e


def lock_folder(folder: Path) -> IO[str]:
    """Locks a folder, created if absent, against other writers until the returned file is closed.

    Raises:
      UserError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK_FILE).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read() or "another process"
        file.close()
        raise UserError(f"{folder}: {who} is writing this run; wait for it or stop it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
