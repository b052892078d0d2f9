"""Several programs at a time: on a processor one small program leaves most of the cores idle."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax

MOST = 4


def several() -> int:
    """Returns how many small programs are run at a time: one, but on a processor that is one device."""
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return min(MOST, os.cpu_count() or 1) if alone else 1


def at_once(tasks: Iterable[Callable[[], object]], count: int, stop: Callable[[], object] = lambda: None) -> None:
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
