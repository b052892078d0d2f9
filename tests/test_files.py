"""Files: written as a whole and inside their run folder, read or refused in one line; text on a terminal."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launched import make_world
from safetensors.numpy import load_file, save_file

from dpo_jax import paths, reference
from dpo_jax.commands.export import export_command
from dpo_jax.commands.winrate import winrate_command
from dpo_jax.config.parse import parse_config
from dpo_jax.config.schema import Config
from dpo_jax.data.sources import synthetic
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import open_folder, save_folder
from dpo_jax.pages.run import write_report
from dpo_jax.training import setup
from dpo_jax.training.checkpoint import best_checkpoint, checkpoint_problem, steps_in
from dpo_jax.training.metrics_file import read_metrics, truncate_metrics
from dpo_jax.training.run_folder import check_secrets, tokenizer_hash

# Writing.


def test_of_two_writers_of_a_file_the_later_one_wins_and_the_file_is_whole(tmp_path):
    path = tmp_path / "new" / "o.jsonl"
    with paths.written(path) as one:
        one.write("a" * 20_000 + "\n")
        one.flush()
        with paths.written(path) as two:
            two.write("b\n")
        assert path.read_text() == "b\n"
        one.write("a\n")
        one.flush()
        assert path.read_text() == "b\n"
    assert path.read_text() == "a" * 20_000 + "\na\n"
    assert [p.name for p in path.parent.iterdir()] == ["o.jsonl"]


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "o"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), paths.written(path) as file:
        file.write(str(1 / 0))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("o", "before")]


def test_half_a_surrogate_pair_is_written_as_its_escape(tmp_path):
    with paths.written(tmp_path / "o") as file:
        file.write(json.dumps({"text": "é \ud800"}, ensure_ascii=False))
    assert (tmp_path / "o").read_bytes() == b'{"text": "\xc3\xa9 \\ud800"}'
    assert json.loads((tmp_path / "o").read_text()) == {"text": "é \ud800"}


def test_drafts_of_killed_processes_are_removed_when_they_are_old(tmp_path):
    new, old = tmp_path / f"{paths.DRAFT}1-a", tmp_path / f"{paths.DRAFT}2-b"
    for draft in (new, old):
        draft.write_text("half")
    before = time.time() - 2 * paths.ABANDONED
    os.utime(old, (before, before))
    paths.remove_drafts(tmp_path)
    assert (new.exists(), old.exists()) == (True, False)
    paths.remove_drafts(tmp_path, age=0)
    assert not new.exists()


@pytest.fixture
def run(tmp_path):
    """A folder with the files of a finished run."""
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("batch_size: 4\n")
    (folder / "metrics.jsonl").write_text('{"step": 1, "examples": 4, "loss": 0.5}\n')
    (tmp_path / "outside").mkdir()
    return folder


def test_nothing_is_written_through_a_link_that_leads_out_of_a_run(run, tmp_path):
    outside = tmp_path / "outside"
    (run / "winrate").symlink_to(outside)
    (outside / "config.yaml").write_text("precious")  # which makes the folder look like a run
    (run / "eval.json").symlink_to(outside / "config.yaml")
    for path in (run / "winrate/new/page.html", run / "winrate/config.yaml", run / "eval.json"):
        with pytest.raises(UserError, match=r"a link that leads out of the run folder, to .*outside.*; remove it"):
            paths.written(path).__enter__()
    with pytest.raises(UserError, match=r"(winrate|eval.json): a link that leads out of the run folder"):
        winrate_command([str(run), "--judge", "happy"])
    assert [(p.name, p.read_text()) for p in outside.iterdir()] == [("config.yaml", "precious")]


def test_links_within_a_run_and_around_runs_are_followed(run, tmp_path):
    (run / "a").mkdir()
    (run / "b").symlink_to(run / "a")
    with paths.written(run / "b/x") as file:
        file.write("1")
    assert (run / "a/x").read_text() == "1"
    paths.refuse_links(run)
    (tmp_path / "config.yaml").write_text("a: 1")  # of a project, no run
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    with paths.written(tmp_path / "elsewhere" / tmp_path.name / "y") as file:
        file.write("2")
    assert (tmp_path / "y").read_text() == "2"


def test_a_link_to_itself_is_no_endless_way(run):
    (run / "loop").symlink_to("loop")
    paths.refuse_links(run)
    assert write_report([run], run / "report.html").is_file()


# Caches.


def test_every_flipped_byte_of_a_cached_file_is_noticed(tmp_path, caplog):
    path = tmp_path / "c"
    assert paths.read_checked(path) is None
    assert not caplog.records
    paths.write_checked(path, b"content")
    assert paths.read_checked(path) == b"content"
    stored = path.read_bytes()
    for place in range(len(stored)):
        path.write_bytes(stored[:place] + bytes([stored[place] ^ 1]) + stored[place + 1 :])
        assert paths.read_checked(path) is None
    for part in (b"", stored[:-1], stored + b"x", b"content"):
        path.write_bytes(part)
        assert paths.read_checked(path) is None
    assert "damaged; computing it again" in caplog.text


def test_a_flipped_byte_in_the_reference_cache_is_noticed(tmp_path):
    """One bit of one log-prob: the number stays finite, and the shape right."""
    right = np.linspace(-90, -1, 6, dtype=np.float32).reshape(3, 2)
    file = tmp_path / "k.npy"
    for value in (right, right + 1):
        found, hit = reference.cached_array(tmp_path, "k", lambda value=value: value, (3, 2))
        np.testing.assert_array_equal(found, value)
        assert not hit
        stored = bytearray(file.read_bytes())
        stored[140] ^= 1
        file.write_bytes(stored)
    np.testing.assert_array_equal(reference.cached_array(tmp_path, "k", lambda: right, (3, 2))[0], right)
    assert reference.cached_array(tmp_path, "k", lambda: right + 1, (3, 2))[1]


def test_without_a_home_the_cache_folder_must_be_named(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.setenv("DPO_JAX_CACHE", "here")
    assert paths.cache_folder() == Path("here")
    monkeypatch.delenv("DPO_JAX_CACHE")
    with pytest.raises(UserError, match="no home folder for the caches; set DPO_JAX_CACHE"):
        paths.cache_folder()


# Reading.


@pytest.mark.parametrize("content", [b"\xff\n", b"[1]\n", b"3\n", b"[" * 100_000 + b"\n", b"1" * 5_000 + b"\n"])
def test_damaged_lines_of_metrics_are_named(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n' + content)
    for function in (read_metrics, lambda path: truncate_metrics(path, 1)):
        with pytest.raises(UserError, match=r"m\.jsonl:2: not (JSON|a JSON object).*; remove that line"):
            function(tmp_path / "m.jsonl")


@pytest.mark.parametrize("step", ["x", None, 1.5, True])
def test_a_line_without_a_step_is_named(tmp_path, step):
    (tmp_path / "m.jsonl").write_text(json.dumps({"step": step}) + "\n")
    with pytest.raises(UserError, match="a line has the step"):
        truncate_metrics(tmp_path / "m.jsonl", 1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("eval.json", "[]", r"eval\.json: must hold an object"),
        ("eval.json", '{"metrics": {"a": 1}}', r"eval\.json: metrics must hold a mean each"),
        ("eval.json", '{"metrics": [1]}', r"eval\.json: metrics must hold a mean each"),
        ("data.json", "{}", r"data\.json: must hold a list"),
        ("metrics.jsonl", '{"step":1,"examples":1,"loss":"x"}\n', r"metrics\.jsonl: step 1: loss is 'x'; remove"),
        ("metrics.jsonl", '{"step":"x","examples":1}\n', r"metrics\.jsonl: the step 'x' is no number"),
        ("samples.jsonl", '{"step":1,"prompt":["x"]}\n', r"samples\.jsonl: step 1: prompt is \['x'\]; remove"),
    ],
)
def test_damaged_files_of_a_run_are_named_by_its_report(run, name, content, message):
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report([run], run / "report.html")


def test_a_report_of_odd_numbers_and_texts(run):
    lines = [{"step": i, "examples": i, "loss": loss} for i, loss in enumerate((1e308, 0.25, -1e308, 10**400, None))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "a \\ud800"}\n')
    page = write_report([run], run / "report.html").read_text()
    assert "Not finite, so not drawn: 4 of the values." in page
    assert "a \\ud800" in page


def test_names_of_checkpoints_are_numbers_as_they_are_written(tmp_path):
    for name in ("7", "10", "007", "²", "-1", "1.orbax", "9" * 30):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [10, 7]


def manifest(folder, **changed):
    content = {"format": 1, "files": {"a": "x"}, "leaves": {"w": ["float32", [2], 5]}, "metrics": {"loss": 1.0}}
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(content | changed))


@pytest.mark.parametrize("part", [{"leaves": {"w": 5}}, {"leaves": {"w": ["a", [2]]}}, {"metrics": {"loss": "x"}}])
def test_a_damaged_manifest_is_a_problem_of_its_checkpoint_alone(tmp_path, part, caplog):
    manifest(tmp_path / "2", metrics={"loss": 3.0})
    manifest(tmp_path / "1", **part)
    assert checkpoint_problem(tmp_path / "1") == "its manifest is damaged"
    assert best_checkpoint(tmp_path, "loss") == 2
    assert "checkpoint 1: its manifest is damaged" in caplog.text


def test_a_name_with_a_null_byte_in_a_manifest_is_a_problem(tmp_path):
    manifest(tmp_path / "1", files={"\0": "x"})
    assert "outside the checkpoint" in checkpoint_problem(tmp_path / "1")


# Secrets.


@pytest.mark.parametrize(
    "body", ["api_key=abc", "Authorization: x", "password=1", "x=https://me:pw@host", "auth_token=1"]
)
def test_secrets_by_the_name_of_a_field_are_refused(body):
    settings = parse_config(Config, None, ["--data.options", body], prog="x")
    with pytest.raises(UserError, match="holds a password or token"):
        check_secrets(settings)
    check_secrets(parse_config(Config, None, ["--data.options", "max_tokens=300", "secretary=1"], prog="x"))


def test_winrate_refuses_secrets_before_it_reads_anything(run):
    with pytest.raises(UserError, match=r"endpoint\.base_url: holds a password or token") as told:
        winrate_command([str(run), "--judge", "endpoint", "--endpoint.base_url", "https://me:hunter2@host/v1"])
    assert "hunter2" not in str(told.value)


# Resuming.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pairs and two model folders, `m` and its copy `n`."""
    with pytest.MonkeyPatch.context() as patch:
        folder = make_world(tmp_path_factory.mktemp("inputs"))
        patch.chdir(folder)
        patch.setenv("DPO_JAX_CACHE", str(folder / "cache"))
        loaded = setup.load_policy(Config().model.__class__(config="tiny.json"), synthetic.synthetic_tokenizer(), 0)
        for name in ("m", "n"):
            save_folder(folder / name, loaded.params, loaded.hf_config, synthetic.synthetic_tokenizer())
        yield folder


def claimed(*overrides, run="runs/x"):
    """Sets up a run that starts from `m`, and gives its folder back."""
    settings = parse_config(Config, "dpo.yaml", [*overrides, "--run", run], prog="x")
    run = setup.setup_run(replace(settings, model=replace(settings.model, path="m", config="", tokenizer="")))
    run.lock.__exit__(None, None, None)
    return run


def test_the_samples_of_a_run_are_of_distinct_prompts(world):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    first, second = list({row["prompt"]: row for row in rows}.values())[:2]
    repeated = [first, first | {"chosen": second["chosen"]}, first | {"rejected": second["rejected"]}, second]
    (world / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in repeated))
    run = claimed("--data.eval_path", "held_out.jsonl", "--data.eval_fraction", "0", run="runs/distinct")
    assert len(run.eval_table) == 4
    assert run.prompts == [first["prompt"], second["prompt"]]


def scale(file, factor):
    save_file({name: tensor * np.float32(factor) for name, tensor in load_file(file).items()}, file)


def test_a_resumed_run_notices_another_model_reference_and_tokenizer(world):
    """Each is named in the config only, by the path of a folder."""
    begun = claimed("--reference.path", "n")
    assert set(begun.inputs) == {
        "training data", "held-out data", "the model at the start", "the reference", "the tokenizer",
        "the kind of prompts",
    }  # fmt: skip
    assert json.loads((world / "runs/x/inputs.json").read_text()) == begun.inputs
    assert begun.load_reference
    assert begun.load_reference() is begun.load_reference()  # read once
    for name, what in (("m", "the model at the start"), ("n", "the reference")):
        scale(world / name / "model.safetensors", 2.0)
        with pytest.raises(UserError, match=f"^runs/x: {what} changed since this run began; set another --run, or rem"):
            claimed("--reference.path", "n")
        scale(world / name / "model.safetensors", 0.5)
    file = world / "m/tokenizer_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"chat_template": "{{ messages }}"}))
    with pytest.raises(UserError, match="the tokenizer changed since this run began"):
        claimed("--reference.path", "n")
    file.write_text(before)
    assert claimed("--reference.path", "n").inputs == begun.inputs
    (world / "runs/x/inputs.json").write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json: not JSON"):
        claimed("--reference.path", "n")
    (world / "runs/x/inputs.json").unlink()


def test_a_tokenizer_is_known_by_vocabulary_special_tokens_and_template():
    one = synthetic.synthetic_tokenizer()
    known = tokenizer_hash(one)
    assert tokenizer_hash(synthetic.synthetic_tokenizer()) == known
    one.chat_template = "{{ messages }}"
    assert tokenizer_hash(one) != known
    two = synthetic.synthetic_tokenizer()
    two.add_tokens(["another"])
    assert tokenizer_hash(two) != known


def test_a_new_head_and_random_weights_are_no_inputs(world):
    """Their last bits may differ between devices, and a run may go on elsewhere."""
    settings = parse_config(Config, "dpo.yaml", [], prog="x")
    loaded = setup.load_policy(settings.model, synthetic.synthetic_tokenizer(), 0)
    other = setup.load_policy(settings.model, synthetic.synthetic_tokenizer(), 1)
    assert setup.start_hashes(settings, loaded) == setup.start_hashes(settings, other)
    deeper = loaded.model._replace(architecture=replace(loaded.model.architecture, eps=1e-3))
    assert setup.start_hashes(settings, loaded) != setup.start_hashes(settings, loaded._replace(model=deeper))
    assert open_folder(world / "m")[0] == loaded.model.architecture


def test_an_export_replaces_nothing_that_its_run_is_made_of(world):
    """Even where an export wrote it, as `m` and `n`."""
    run = claimed("--reference.path", "n").folder
    assert run.is_dir()
    for out, what in (("m", "model.path"), ("n", "reference.path"), ("./runs/../m", "model.path")):
        with pytest.raises(UserError, match=rf"is {what} of this run, which would be replaced; choose another folder"):
            export_command(["runs/x", out])
    (world / "mine").mkdir()
    (world / "mine/thesis.model").write_text("precious")
    with pytest.raises(UserError, match=r"mine: holds thesis.model, which no export wrote"):
        export_command(["runs/x", "mine"])
    (run / "model").mkdir()
    (run / "model/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"model: holds notes.txt, which no export wrote"):  # before training
        claimed("--reference.path", "n")
