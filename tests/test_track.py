"""Trackers get the metrics of metrics.jsonl, also in resumed runs."""

import html
import math
import struct
import sys
from types import SimpleNamespace

import pytest
from launched import make_world
from tensorboardX.proto.event_pb2 import Event

from dpo_jax import cli
from dpo_jax.errors import UserError
from dpo_jax.training import trackers
from dpo_jax.training.metrics_file import read_metrics


def events(folder):
    """Returns {(step, name): value} of a folder's event files, as TensorBoard reads them: a start discards what came
    at its step or later before it."""
    found = {}
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[0] < event.step}
            found |= {(event.step, v.tag): _value(v) for v in event.summary.value}
    return found


def _value(value):
    return value.tensor.string_val[0].decode() if value.tag == "samples/text_summary" else value.simple_value


def expected(folder):
    """Returns the numbers of metrics.jsonl in the same form."""
    rows = read_metrics(folder / "metrics.jsonl")
    numbers = ((r["step"], k, v) for r in rows for k, v in r.items() if k not in ("step", "examples"))
    return {(step, name): value for step, name, value in numbers if value is not None}


@pytest.mark.slow
def test_tensorboard_of_a_resumed_run_equals_metrics_jsonl(tmp_path, monkeypatch):
    monkeypatch.chdir(make_world(tmp_path))
    options = ("--eval-every", "0", "--save-every", "3", "--track", "tensorboard")
    cli.run_command(["train", "dpo.yaml", *options, "--max-steps", "5"])
    first = events(tmp_path / "runs/dpo/tensorboard")
    assert max(step for step, _ in first) == 5
    # As if the run was killed after step 3.
    for name in ("model", "checkpoints/5"):
        (tmp_path / "runs/dpo" / name).rename(tmp_path / name.replace("/", "-"))
    cli.run_command(["train", "dpo.yaml", *options, "--max-steps", "6"])
    found, lines = events(tmp_path / "runs/dpo/tensorboard"), expected(tmp_path / "runs/dpo")
    shown = {step: found.pop((step, "samples/text_summary")) for step in (0, 6)}
    assert found.keys() == lines.keys()
    for key, value in found.items():
        assert value == pytest.approx(lines[key], rel=1e-6), key
    # The step 5 of the first try is gone, with the evaluation that was its end.
    assert (5, "eval_loss") in first
    assert (5, "eval_loss") not in found
    samples = read_metrics(tmp_path / "runs/dpo/samples.jsonl")
    for step, text in shown.items():
        assert_is_table(text, [s for s in samples if s["step"] == step])


def assert_is_table(text, samples):
    head, rule, *rows = text.split("\n")
    assert (head, rule) == ("| prompt | policy | reference |", "| --- | --- | --- |")
    assert len(rows) == len(samples) == 2
    for row, sample in zip(rows, samples, strict=True):
        cells = [html.unescape(cell.strip()) for cell in row.strip("|").split(" | ")]
        assert cells == [sample[key].strip() for key in ("prompt", "policy", "reference")]


def test_cells_of_a_table_are_escaped(tmp_path):
    tracker = trackers.make_tracker("tensorboard", tmp_path, {})
    tracker.table(2, [{"prompt": "a|b\nc", "reference": None}, {"prompt": "<b>", "reference": "d"}])
    tracker.close()
    text = "| prompt | reference |\n| --- | --- |\n| a&#124;b<br>c |  |\n| &lt;b&gt; | d |"
    assert events(tmp_path / "tensorboard") == {(2, "samples/text_summary"): text}


def test_wandb_resumes_the_same_run(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"))

    def init(**options):
        calls.append(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Table=lambda **table: table))
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        tracker = trackers.make_tracker("wandb", tmp_path, {"seed": 1})
        tracker.log(3, {"loss": 0.5, "kl": math.nan, "note": "text", "none": None})
        tracker.table(3, [{"prompt": "p", "policy": "a"}, {"prompt": "q", "policy": None}])
        tracker.table(4, [])
        tracker.close()
    (start, line, table, end), again = calls[:4], calls[4:]
    assert again == [start, line, table, end]
    assert (line, end) == ((3, {"loss": 0.5, "loss/train": 0.5}), "end")
    assert table == (3, {"samples": {"columns": ["prompt", "policy"], "data": [["p", "a"], ["q", None]]}})
    assert (start["project"], start["name"], start["resume"]) == ("dpo_jax", tmp_path.name, "allow")
    assert (start["dir"], start["config"]) == (str(tmp_path), {"seed": 1})
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first try")
    trackers.make_tracker("wandb", tmp_path, {}).log(0, {})
    assert (calls[-2]["project"], calls[-2]["name"], calls[-2]["id"]) == ("mine", "first try", start["id"])
    (tmp_path / "wandb_id").unlink()  # as of a folder that was removed and made again
    trackers.make_tracker("wandb", tmp_path, {}).log(0, {})
    assert calls[-2]["id"] != start["id"]


def test_wandb_gets_the_metric_names_of_the_original_code_too(tmp_path, monkeypatch):
    lines = []
    run = SimpleNamespace(log=lambda values, step: lines.append(values), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    given = {"loss": 1.0, "loss/sft": 2.0, "rewards/margins": 3.0, "logps/chosen": 4.0, "grad_norm": 5.0}
    tracker = trackers.make_tracker("wandb", tmp_path, {})
    tracker.log(1, given)
    tracker.log(1, {f"eval_{name}": value for name, value in given.items()})
    train = {"loss/train": 1.0, "rewards_train/margins": 3.0, "logps_train/chosen": 4.0}
    evaluated = {name.replace("train", "eval"): value for name, value in train.items()}
    assert lines == [given | train, {f"eval_{name}": value for name, value in given.items()} | evaluated]


def test_an_error_of_wandb_is_one_line(tmp_path, monkeypatch):
    class RefusedError(Exception):
        pass

    def init(**options):
        raise RefusedError("No API\nkey")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RefusedError))
    with pytest.raises(UserError, match=r"track: wandb: No API key; log in"):
        trackers.make_tracker("wandb", tmp_path, {}).log(0, {})


def test_a_tracker_starts_at_the_first_log(tmp_path):
    tracker = trackers.make_tracker("tensorboard", tmp_path, {})
    tracker.close()
    assert not list(tmp_path.iterdir())
    trackers.make_tracker("", tmp_path, {}).log(1, {"loss": 1.0})


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(UserError, match=r"track: no_such_package is not installed; pip install 'dpo_jax\[track\]'"):
        trackers.check_tracker("wandb")
    trackers.check_tracker("")
