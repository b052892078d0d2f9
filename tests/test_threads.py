"""Several tasks at a time: all are done, and one that fails ends the others."""

import threading
from functools import partial

import pytest

from dpo_jax import distributed


@pytest.mark.parametrize("count", [1, 3])
def test_all_tasks_are_done(count):
    done = []
    distributed.run_concurrently((partial(done.append, i) for i in range(20)), count)
    assert sorted(done) == list(range(20))
    assert count > 1 or done == list(range(20))


def test_so_many_run_at_a_time():
    """Three wait for each other, which two could not."""
    together, met = threading.Barrier(3, timeout=60), []
    distributed.run_concurrently([lambda: met.append(together.wait())] * 6, 3)
    assert sorted(met) == [0, 0, 1, 1, 2, 2]


def test_a_task_that_fails_ends_the_others():
    """One that runs is told to stop, those that wait never start, and what failed is told."""
    stopped, started, ended = threading.Event(), threading.Event(), []

    def long():
        started.set()
        ended.append(stopped.wait(60))

    def fails():
        assert started.wait(60)
        raise ValueError("it is not finite")

    with pytest.raises(ValueError, match="it is not finite"):
        distributed.run_concurrently([long, fails, *[long] * 50], 2, stopped.set)
    assert all(ended)
    assert 1 <= len(ended) < 40


def test_a_task_that_cannot_be_made_ends_the_others():
    stopped = threading.Event()

    def tasks():
        yield partial(stopped.wait, 60)
        raise ValueError("no reward model")

    with pytest.raises(ValueError, match="no reward model"):
        distributed.run_concurrently(tasks(), 2, stopped.set)
    assert stopped.is_set()


def test_there_is_one_at_a_time_on_several_devices():
    """The tests have four, whose programs would wait for each other."""
    assert distributed.concurrent_programs() == 1
