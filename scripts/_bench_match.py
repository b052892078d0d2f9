"""Matches of scripts/bench: systems in processes of their own, which take steps in turn or one after another."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from _bench_list import LEVERED, SYSTEMS, Step, System

from dpo_jax.__main__ import HUGE_PAGES

HERE = Path(__file__).resolve().parent


class Worker:
    """A system in its own process."""

    def __init__(self, system: System, folder: Path, steps: int, batch_size: int):
        index = (*SYSTEMS, *LEVERED).index(system)
        self.system, self.log = system, folder / f"{index}.log"
        command = [sys.executable, str(HERE / "_bench_systems.py"), *map(str, (index, folder, steps, batch_size))]
        env = os.environ | {"HF_HUB_OFFLINE": "1"}
        if system.family == "dpo_jax":
            env["GLIBC_TUNABLES"] = HUGE_PAGES  # as `dpo-jax train` sets it
        pipe = subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=env)

    def step(self) -> Step:
        """Has the worker take one step."""
        assert self.process.stdin
        assert self.process.stdout
        busy, start = busy_seconds(), time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # a worker that has died answers nothing either
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"bench: {self.system.name} in {self.system.dtype} failed:\n{self.log.read_text()[-3000:]}")
        step = Step(*json.loads(answer))
        foreign = (busy_seconds() - busy - step.cpu) / (time.perf_counter() - start)
        return step._replace(foreign=max(0.0, foreign))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(60)


def busy_seconds() -> float:
    """Returns the seconds that all cores of the machine have worked since it started (Linux; 0 elsewhere)."""
    try:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(systems: list[System], folder: Path, sizes: tuple[int, int, int], alone: bool = False) -> list[list[Step]]:
    """Returns the steps of each system, warm-up included.

    Args:
      systems: that meet.
      folder: of the model and the rows.
      sizes: steps of warm-up, timed steps, comparisons in a step.
      alone: each system ends before the next one starts, as one device may not hold two; else they take turns.
    """
    groups = [[system] for system in systems] if alone else [systems]
    return [found for group in groups for found in take_turns(group, folder, sizes)]


def take_turns(systems: list[System], folder: Path, sizes: tuple[int, int, int]) -> list[list[Step]]:
    """Returns the steps of each system; the systems take turns, every other round backwards."""
    warm, steps, batch_size = sizes
    workers = [Worker(system, folder, warm + steps, batch_size) for system in systems]
    found: list[list[Step]] = [[] for _ in workers]
    try:
        for turn in range(warm + steps):
            for i in range(len(workers)) if turn % 2 == 0 else reversed(range(len(workers))):
                found[i].append(workers[i].step())
    finally:
        for worker in workers:
            worker.close()
    return found
