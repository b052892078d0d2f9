"""Trackers get the metrics of metrics.jsonl, also in resumed runs."""

import html
import json
import math
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
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
    return value.tensor.string_val[0].decode() if value.tag.endswith("/text_summary") else value.simple_value


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
    for step in (0, 4):  # both starts
        assert "| loss.name | dpo |" in found.pop((step, "config/text_summary"))
    assert found.pop((6, "evaluation/text_summary")).startswith("| metric | mean | low | high | n |")
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


SETTINGS = {"seed": 1, "loss": {"name": "dpo", "beta": 0.1}, "data": {"path": ("a", "b")}}
FLAT = {"seed": "1", "loss.name": "dpo", "loss.beta": "0.1", "data.path": "a b"}
ROWS = {step: [{"prompt": "p", "policy": f"at {step}"}, {"prompt": "q", "policy": None}] for step in (0, 3)}
FINAL = {
    "eval_loss": {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 9},
    "eval_kl": {"mean": 2.25, "low": 1.5, "high": 3.0, "n": 9},
}
ENDS = {"final/eval_loss": 0.6, "final/eval_loss_low": 0.5, "final/eval_loss_high": 0.7}
ENDS |= {"final/eval_kl": 2.25, "final/eval_kl_low": 1.5, "final/eval_kl_high": 3.0}
LOGGED = {  # step -> metrics
    0: {"eval_loss": 0.7, "eval_kl": 0.0},
    2: {"loss": 0.25, "rewards/chosen": 1.5},
    3: {"loss": 0.5, "eval_loss": 0.6, "eval_kl": 2.25},
}


def drive(name, folder):
    """Gives a tracker what a run gives it, in two processes' worth of calls."""
    for steps in ((0, 2), (3,)):
        tracker = trackers.make_tracker(name, folder, SETTINGS)
        for step in steps:
            tracker.log(step, LOGGED[step] | {"missing": math.nan})
            tracker.table(step, ROWS.get(step, []))
        if step == 3:
            tracker.final(step, FINAL)
        tracker.close()
        if name == "wandb":
            time.sleep(1.1)  # its folder is named by the second, and a second process would write over the first's


def wandb_records(path):
    """Yields the records of a .wandb file: a LevelDB log, in blocks of 32 KiB, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block has no room for a head
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def items(messages):
    return {m.key or "/".join(m.nested_key): json.loads(m.value_json) for m in messages}


@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
def test_wandb_keeps_config_metrics_and_tables_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    drive("wandb", tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len({path.stem for path in files}) == 1  # the run's id
    history, summary, config = {}, {}, {}
    for record in (record for path in files for record in wandb_records(path)):
        found = items(record.history.item)
        if found:
            history.setdefault(int(found["_step"]), {}).update(found)
        summary |= items(record.summary.update)
        config |= items(record.run.config.update)
    for step, values in LOGGED.items():
        assert values.items() <= history[step].items()
        assert "missing" not in history[step]
    assert config["loss"] == SETTINGS["loss"]
    assert config["data"] == {"path": ["a", "b"]}
    assert ENDS.items() <= summary.items()
    tables = {path.name.split(".")[0]: json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json")}
    named = {name.rsplit("_", 1)[0]: (table["columns"], table["data"]) for name, table in tables.items()}
    assert named["samples_3"] == (["prompt", "policy"], [["p", "at 3"], ["q", None]])
    (final,) = (table[1] for name, table in named.items() if name.startswith("evaluation_"))
    assert final == [["eval_loss", 0.6, 0.5, 0.7, 9], ["eval_kl", 2.25, 1.5, 3.0, 9]]


def test_wandb_can_be_switched_off(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    drive("wandb", tmp_path)
    assert not [record for record in caplog.records if record.name.startswith("dpo_jax")]
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_id"]


def test_mlflow_has_parameters_metrics_and_artifacts_of_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    (tmp_path / "first").mkdir()
    drive("mlflow", tmp_path / "first")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_id, run.info.run_name) == ((tmp_path / "first/mlflow_id").read_text(), "first")
    assert run.info.status == "FINISHED"
    assert run.data.params == FLAT
    for name in ("eval_loss", "eval_kl", "loss", "rewards/chosen"):
        found = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, name)}
        assert found == {step: values[name] for step, values in LOGGED.items() if name in values}
    assert ENDS.items() <= run.data.metrics.items()
    assert "missing" not in run.data.metrics
    load = lambda name: mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/{name}")  # noqa: E731 - shortest here
    assert load("samples/3.json") == {"step": 3, "samples": ROWS[3]}
    assert load("evaluation.json") == FINAL
    config = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/config.yaml")
    assert yaml.safe_load(config) == SETTINGS | {"data": {"path": ["a", "b"]}}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # of mlflow's use of SQLAlchemy 2.1
def test_mlflow_without_a_server_keeps_its_database_in_the_run_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    drive("mlflow", tmp_path / "first")
    assert [entry.name for entry in tmp_path.iterdir()] == ["first"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/first/mlflow/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("dpo_jax").experiment_id])
    assert run.data.params == FLAT
    found = {entry.step: entry.value for entry in client.get_metric_history(run.info.run_id, "loss")}
    assert found == {step: values["loss"] for step, values in LOGGED.items() if "loss" in values}
    (written,) = (tmp_path / "first/mlflow").rglob("evaluation.json")
    assert json.loads(written.read_text()) == FINAL


def test_trackio_has_config_metrics_and_tables_of_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (tmp_path / "first").mkdir()
    drive("trackio", tmp_path / "first")
    (run,) = trackio.Api().runs("dpo_jax")
    assert run.name == (tmp_path / "first/trackio_id").read_text()
    assert run.name.startswith("first-")
    assert run.config["loss"] == SETTINGS["loss"]
    found = {}
    for line in SQLiteStorage.get_logs("dpo_jax", run.name):
        found.setdefault(line["step"], {}).update(line)
    for step, values in LOGGED.items():
        assert values.items() <= found[step].items()
    assert ENDS.items() <= found[3].items()
    assert found[3]["samples"]["_value"] == ROWS[3]
    assert found[3]["evaluation"]["_value"] == [{"metric": name, **entry} for name, entry in FINAL.items()]


def test_tensorboard_has_the_config_and_the_last_evaluation(tmp_path):
    drive("tensorboard", tmp_path)
    found = events(tmp_path / "tensorboard")
    assert found[3, "evaluation/text_summary"].splitlines()[2:] == [
        "| eval_loss | 0.6 | 0.5 | 0.7 | 9 |",
        "| eval_kl | 2.25 | 1.5 | 3.0 | 9 |",
    ]
    assert found[3, "config/text_summary"].splitlines()[2:] == [f"| {key} | {text} |" for key, text in FLAT.items()]
    compared = events(tmp_path / "tensorboard/hparams")
    assert compared[3, "final/eval_kl"] == 2.25
    assert compared[3, "final/eval_loss"] == pytest.approx(0.6)


def test_cells_of_a_table_are_escaped(tmp_path):
    tracker = trackers.make_tracker("tensorboard", tmp_path, SETTINGS)
    tracker.table(2, [{"prompt": "a|b\nc", "reference": None}, {"prompt": "<b>", "reference": "d"}])
    tracker.close()
    text = "| prompt | reference |\n| --- | --- |\n| a&#124;b<br>c |  |\n| &lt;b&gt; | d |"
    assert events(tmp_path / "tensorboard")[2, "samples/text_summary"] == text


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


def test_a_tracker_that_fails_is_told_once_and_left(tmp_path, monkeypatch, caplog):
    tries = []

    def init(**options):
        tries.append(options)
        raise ConnectionError("No API\nkey \x1b[31m")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    tracker = trackers.make_tracker("wandb", tmp_path, {})
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.final(3, FINAL)
    tracker.close()
    assert len(tries) == 1
    why = r"ConnectionError: No API key \x1b[31m; the run goes on without it; log in with `wandb login`"
    assert caplog.messages == [f"track: wandb: {why}, or set WANDB_MODE=offline"]


@pytest.mark.parametrize(
    "method", ["log", *(pytest.param(name, marks=pytest.mark.slow) for name in ("table", "final", "close"))]
)
def test_a_tracker_that_fails_later_is_told_once_too(tmp_path, monkeypatch, caplog, method):
    calls = []

    def note(name):
        def call(*args):
            calls.append(name)
            if name == method:
                raise OSError("connection lost")

        return call

    methods = trackers.Tracker(*map(note, trackers.Tracker._fields))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *_: methods)
    drive("wandb", tmp_path)
    processes = 1 if method == "final" else 2
    assert calls.count(method) == processes
    assert [m.split(";")[0] for m in caplog.messages] == ["track: wandb: OSError: connection lost"] * processes


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
