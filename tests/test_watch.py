"""Signals, hangs, out of memory, a second writer, lost processes."""

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import launched
import pytest

from dpo_jax import distributed
from dpo_jax.config.schema import Config, DataConfig, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.runs import sweep, train
from dpo_jax.training import checkpoint, interrupts

LOOP = """
import time
from dpo_jax.training import interrupts
with interrupts.stop_requests() as asked:
    print("begun", flush=True)
    while True:
        time.sleep(0.02)
        if asked() and {polite}:
            print("asked:", asked(), flush=True)
            raise SystemExit(interrupts.EXIT_AGAIN)
"""


def loop(polite):
    env = os.environ | {"PYTHONPATH": str(launched.ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(polite=polite)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_after_the_step(number):
    process = loop(polite=True)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert out == f"asked: {number.name}\n"
    assert process.returncode == 75


def test_the_second_ctrl_c_stops_at_once():
    process = loop(polite=False)
    process.send_signal(signal.SIGINT)
    assert "press Ctrl-C again to stop now" in process.stderr.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "dpo-jax: stopped; the same command resumes" in err
    assert process.returncode == 130


def test_signal_handlers_are_restored():
    before = {s: signal.getsignal(s) for s in interrupts.SIGNALS}
    with interrupts.stop_requests() as asked:
        assert not asked()
    assert {s: signal.getsignal(s) for s in interrupts.SIGNALS} == before


def ended_when_asked(name):
    """A run that is asked to stop after its last step, when it only evaluates and exports: it ends as usual."""
    with interrupts.stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        late = time.monotonic() + 20
        while not asked() and time.monotonic() < late:
            time.sleep(0.01)
    return name


def made_run(config):
    return SimpleNamespace(config=config, folder=Path(config.run or "runs/a"), lock=io.StringIO())


def test_a_request_while_a_run_of_a_sweep_ends_is_not_lost(monkeypatch, caplog):
    monkeypatch.setattr(sweep.setup, "setup_run", lambda one: made_run(one))
    monkeypatch.setattr(sweep, "with_remat", lambda one: one)
    monkeypatch.setattr(sweep, "prepare_run", lambda run: "prepared")
    monkeypatch.setattr(sweep, "train_run", lambda run, *_: ended_when_asked(run.folder.name))
    monkeypatch.setattr(sweep, "finish_run", lambda folder, params: trained.append(params))
    trained, configs = [], [Config(run=f"runs/{name}", batch_size=8 * (i + 1)) for i, name in enumerate("abc")]
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stop:
        sweep.train_all(configs, "c.yaml")
    assert (stop.value.code, trained) == (interrupts.EXIT_AGAIN, ["a"])
    said = "asked to end (SIGTERM): 1 of 3 runs have ended; the same command goes on from there"
    assert caplog.records[-1].getMessage() == said


def test_a_run_of_a_sweep_that_fails_is_named_before_the_sweep_is_asked_to_end(monkeypatch, caplog):
    def failed(one):
        ended_when_asked(one)
        raise UserError("the loss is not finite")

    monkeypatch.setattr(sweep, "with_remat", failed)
    configs = [Config(run=f"runs/{name}") for name in "ab"]
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit):
        sweep.train_all(configs, "c.yaml")
    assert [record.getMessage() for record in caplog.records[1:]] == [
        "a has failed: the loss is not finite",
        "asked to end (SIGTERM): 1 of 2 runs have ended; the same command goes on from there",
    ]


def test_a_request_while_a_run_of_a_sweep_is_set_up_ends_it_before_it_compiles(monkeypatch):
    monkeypatch.setattr(sweep, "with_remat", ended_when_asked)
    monkeypatch.setattr(sweep.setup, "setup_run", lambda one: made.append(made_run(one)) or made[-1])
    monkeypatch.setattr(sweep, "prepare_run", lambda run: pytest.fail("compiles"))
    made = []
    with pytest.raises(SystemExit) as stop:
        sweep.train_all([Config(run="runs/a")], "c.yaml")
    assert stop.value.code == interrupts.EXIT_AGAIN
    assert made[0].lock.closed


def test_a_request_while_an_earlier_stage_is_set_up_ends_it_before_it_compiles(monkeypatch, tmp_path):
    (tmp_path / "first.yaml").write_text("{}")
    monkeypatch.setattr(train.setup, "check_config", lambda _: None)
    monkeypatch.setattr(train, "with_remat", ended_when_asked)
    monkeypatch.setattr(train.setup, "setup_run", lambda one: made.append(made_run(one)) or made[-1])
    monkeypatch.setattr(train, "train_run", lambda *_, **__: pytest.fail("compiles"))
    made = []
    with pytest.raises(SystemExit) as stop:
        train.with_base_model(Config(model=ModelConfig(path=str(tmp_path / "first.yaml"))), "second.yaml")
    assert (stop.value.code, made[0].lock.closed) == (interrupts.EXIT_AGAIN, True)


def test_a_program_that_cannot_be_prepared_is_not_taken_for_another(monkeypatch):
    """The second run has a program of its own, which fails; the third has the same, and must try again."""
    prepared = iter(["first", UserError("no room"), "third"])

    def prepare(run):
        if isinstance(found := next(prepared), UserError):
            raise found
        return found

    runs = [Config(run=f"runs/{name}", max_steps=steps) for name, steps in (("a", 1), ("b", 2), ("c", 2))]
    monkeypatch.setattr(sweep.setup, "setup_run", lambda one: made_run(one))
    monkeypatch.setattr(sweep.setup, "sweep_member", lambda _, one: made_run(one))
    monkeypatch.setattr(sweep, "group_runs", lambda configs: [configs])
    monkeypatch.setattr(sweep, "with_remat", lambda one: one)
    monkeypatch.setattr(sweep, "prepare_run", prepare)
    monkeypatch.setattr(sweep, "with_hparams", lambda *_: "the wrong one")
    monkeypatch.setattr(sweep, "train_run", lambda run, program, _: program)
    monkeypatch.setattr(sweep, "finish_run", lambda folder, params: params)
    assert sweep.train_all(runs, "c.yaml") == (["first", "third"], ["b: no room"])


def test_a_preemption_notice_which_is_given_once_is_remembered(monkeypatch):
    given = iter(["", "a notice", "", ""])
    monkeypatch.setattr(interrupts.distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(interrupts, "_preemption", lambda: next(given))
    with interrupts.stop_requests() as asked, interrupts.stop_requests() as again:
        assert [asked(), again(), asked(), again()] == ["", "a notice", "a notice", "a notice"]
    assert list(given) == ["", ""]  # nobody asks after the notice


def test_a_request_while_an_earlier_stage_ends_is_not_lost(monkeypatch, tmp_path, caplog):
    (tmp_path / "first.yaml").write_text("{}")
    monkeypatch.setattr(train.setup, "check_config", lambda _: None)
    monkeypatch.setattr(train, "train_settings", lambda settings: SimpleNamespace(folder=ended_when_asked("a")))
    later = Config(model=ModelConfig(path=str(tmp_path / "first.yaml")))
    with caplog.at_level(logging.INFO), pytest.raises(SystemExit) as stop:
        train.with_base_model(later, "second.yaml")
    assert stop.value.code == interrupts.EXIT_AGAIN
    assert caplog.records[-1].getMessage().startswith(f"asked to end (SIGTERM): {tmp_path}/first.yaml is done; ")


def test_a_hang_prints_stacks_and_ends_the_process():
    code = """
import time
from dpo_jax.training import interrupts
with interrupts.hang_watchdog(0.5) as alive:
    for _ in range(4):
        alive()
        time.sleep(0.3)
    print("alive", flush=True)
    def stuck_here():
        time.sleep(60)
    stuck_here()
"""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(launched.ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "in stuck_here" in done.stderr
    assert time.monotonic() - start < 50


@pytest.mark.slow
def test_a_process_that_is_stopped_and_continued_does_not_hang():
    """As a suspended job of Slurm: three times as long as `hang_seconds`, and it goes on."""
    code = """
import time
from dpo_jax.training import interrupts
with interrupts.hang_watchdog(1.0) as alive:
    alive()
    print("begun", flush=True)
    for _ in range(40):
        time.sleep(0.1)
        alive()
    print("alive", flush=True)
"""
    env = os.environ | {"PYTHONPATH": str(launched.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[0] == "alive\n"
    assert process.returncode == 0


def test_out_of_memory_lists_remedies():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nlong list of buffers")
    config = Config(data=DataConfig(rows=8), model=ModelConfig(remat="none", compute="float32"))
    with pytest.raises(UserError) as told, interrupts.explain_out_of_memory(config.model, config.data):
        raise full
    assert re.search(
        r"allocating 8 bytes.*data.rows below 8, model.remat full, model.compute bfloat16", str(told.value)
    )
    assert "\n" not in str(told.value)
    with (
        pytest.raises(UserError) as told,
        interrupts.explain_out_of_memory(ModelConfig(remat="full", compute="bfloat16"), DataConfig()),
    ):
        raise full
    assert "data.rows 1, more devices along mesh.fsdp" in str(told.value)
    other = jax.errors.JaxRuntimeError("INTERNAL: else")
    explained = interrupts.explain_out_of_memory(config.model, config.data)
    with pytest.raises(jax.errors.JaxRuntimeError, match="else"), explained:
        raise other


def test_a_folder_has_one_writer(tmp_path):
    with interrupts.lock_folder(tmp_path / "run"):
        code = f"""
from pathlib import Path
from dpo_jax.errors import UserError
from dpo_jax.training import interrupts
try:
    with interrupts.lock_folder(Path({str(tmp_path / "run")!r})):
        print("got it")
except UserError as e:
    print(e)
"""
        env = os.environ | {"PYTHONPATH": str(launched.ROOT)}
        second = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert f"process {os.getpid()} on " in second.stdout
    assert "is writing this run" in second.stdout
    third = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert third.stdout == "got it\n"


BAD = ["", "here", "host:1,2", "host:1,2,x", "host:1,2,2", "host,2,0", "host:1,0,0", "host:1,2,-1"]


@pytest.mark.parametrize("how", BAD)
def test_invalid_distributed_arguments_are_refused(how):
    with pytest.raises(UserError, match=r"--distributed .*set auto .* or HOST:PORT,PROCESSES,INDEX"):
        distributed.initialize(how)


# Whole runs.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder of a small run, trained by two processes."""
    folder = launched.make_world(tmp_path_factory.mktemp("watch"))
    launched.finish(launched.start(folder, "one", launch=launched.launch_local(2, 1)))
    return folder


@pytest.mark.slow
def test_a_notice_to_one_process_ends_all_with_everything_saved(world):
    name = "noticed"
    process = launched.start(world, name, launch=launched.launch_local(2, 1))
    launched.wait_for(world, name, 2)
    os.kill(launched.peers(name)[1], signal.SIGTERM)
    out, _ = launched.finish(process, interrupts.EXIT_AGAIN)
    saved = int(re.search(r"saved at step (\d+)", out)[1])
    assert not checkpoint.checkpoint_problem(world / "runs" / name / "checkpoints" / str(saved))
    out, _ = launched.finish(launched.start(world, name, launch=launched.launch_local(2, 1)))
    assert f"resuming at step {saved} of 20" in out
    launched.assert_same_run(world, name)


@pytest.mark.slow
def test_a_lost_process_ends_all_and_the_launcher_starts_them_again(world):
    """Process 0, to which the others connect."""
    name = "lost"
    process = launched.start(world, name, launch=launched.launch_local(2, 1, "--restarts", "1"))
    launched.wait_for(world, name, 12)  # the save at 10 has waited until that at 5 was whole
    os.kill(launched.peers(name)[0], signal.SIGKILL)
    out, err = launched.finish(process)
    assert re.search(r"launch_local: process \d ended with code -?\d+; ending the others", err)
    assert "starting again, 0 more times at most" in err
    assert re.search(r"resuming at step \d+ of 20", out)
    launched.assert_same_run(world, name)


@pytest.mark.slow
def test_a_failure_of_one_process_is_reported_and_ends_all(world):
    process = launched.start(world, "failed", "--optim.learning_rate", "nan", launch=launched.launch_local(2, 1))
    _, err = launched.finish(process, 2)
    assert re.search(r"dpo-jax: process \d: optim.learning_rate: nan", err)


@pytest.mark.slow
def test_a_step_that_hangs_ends_all(world):
    """One of two processes is stopped; the other waits for it in a step, and prints its stack."""
    process = launched.start(world, "stopped", "--hang-seconds", "30", launch=launched.launch_local(2, 1))
    launched.wait_for(world, "stopped", 3)
    stopped = launched.peers("stopped")[1]
    os.kill(stopped, signal.SIGSTOP)
    _, err = launched.finish(process, 1)
    assert "Timeout (0:00:30)!" in err
    assert "loop.py" in err


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(world):
    process = launched.start(world, "taken")
    launched.wait_for(world, "taken", 1)
    os.kill(process.pid, signal.SIGSTOP)
    _, err = launched.finish(launched.start(world, "taken"), 2)
    assert f"process {process.pid} on " in err
    os.kill(process.pid, signal.SIGCONT)
    launched.finish(process)


@pytest.mark.slow
def test_a_run_with_a_nonfinite_loss_saves_the_batch(world):
    options = ("--optim.learning_rate", "1e30", "--optim.warmup_steps", "0", "--max_nonfinite", "2")
    _, err = launched.finish(launched.start(world, "sick", *options), 2)
    path = re.search(r"token ids of its comparisons .* are in (\S+);", err)[1]
    rows = [json.loads(line) for line in (world / path).read_text().splitlines()]
    assert len(rows) == 16
    assert all(len(row["responses"]) == 2 and row["prompt"] for row in rows)
