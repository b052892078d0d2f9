"""Models of the hub: from a local server with the hub's protocol, from the cache, and without a network."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.folder import model_folder
from dpo_jax.models.huggingface.hub import fetch_model, hub_config_file, is_hub_name

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INSTRUCTIONS = [{"instruction": text, "dataset": "koala"} for text in ("Once upon a time", "The dog said")]
EXTRA = (
    "pytorch_model.bin",
    "modeling_own.py",
    "onnx/model.safetensors",
    "consolidated.safetensors",
    "training_args.bin",
)


class Hub(BaseHTTPRequestHandler):
    """One model, `org/name`, with revisions `main` and `v1`; records the requested files."""

    def __init__(self, *args, folder, asked):
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def log_message(self, format, *args):
        """Suppresses the log."""

    def do_HEAD(self):
        """Returns a file's size and hash, or the list of files."""
        self.answer(send=False)

    def do_GET(self):
        """Returns a file, or the list of files."""
        self.answer(send=True)

    def answer(self, send):
        path, headers, status = self.path.partition("?")[0], {"X-Repo-Commit": COMMIT}, 200
        names = [file.name for file in self.folder.iterdir()] + list(EXTRA)
        if path.startswith("/api/models/org/name/revision/") and path.rsplit("/", 1)[1] in ("main", "v1"):
            siblings = [{"rfilename": name} for name in names]
            body = json.dumps({"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
            headers["Content-Type"] = "application/json"
        elif path == f"/api/models/org/name/tree/{COMMIT}":
            body = json.dumps([{"type": "file", "path": name, "oid": "0" * 40, "size": 9} for name in names]).encode()
            headers["Content-Type"] = "application/json"
        elif path.startswith(f"/org/name/resolve/{COMMIT}/") and "xet" not in path:
            name = path.partition(f"{COMMIT}/")[2]
            self.asked.add(name)
            body = (self.folder / name).read_bytes()
            headers["ETag"] = hashlib.sha256(body).hexdigest()
        elif path == "/datasets/tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json":
            self.asked.add(path)
            body = json.dumps(INSTRUCTIONS).encode()
            headers["ETag"] = hashlib.sha256(body).hexdigest()
        else:
            body, status = b'{"error": "not found"}', 404
            headers["X-Error-Code"] = "RevisionNotFound" if "org/name" in path else "RepoNotFound"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if send:
            self.wfile.write(body)


@pytest.fixture
def server(shared):
    """The address of a hub with a real model, and the names of the requested files."""
    asked = set()
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Hub, folder=shared / "models/tinystories-656k", asked=asked)
    ) as s:
        thread = Thread(target=s.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{s.server_address[1]}", asked
        s.shutdown()
        thread.join()


def run(*args, home, **variables):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "DPO_JAX_CACHE": str(home), **variables}
    command = [sys.executable, *(args if args[0] == "-c" else ("-m", "dpo_jax", *args))]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_a_model_of_the_hub_is_fetched_once_without_code_or_pickles(server, tmp_path):
    address, asked = server
    sample = ("sample", "org/name@v1", "--prompt", "Once upon a time", "--samples.max_new_tokens", "2")
    online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    first = run(*sample, home=tmp_path, **online)
    assert first.returncode == 0, first.stderr
    assert f"org/name@v1: revision {COMMIT}; org/name@{COMMIT} is always this one" in first.stdout
    assert "Once upon a time" in first.stdout
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= asked
    assert all(name.endswith((".safetensors", ".json", ".model")) for name in asked)
    assert not asked & set(EXTRA)
    asked.clear()
    code = "from dpo_jax.models.huggingface import hub; print(hub.fetch_model('org/name@v1').name)"
    assert run("-c", code, home=tmp_path, HF_HUB_OFFLINE="1").stdout.splitlines()[-1] == COMMIT
    assert not asked
    for name, reason in (("org/name@v2", "Revision"), ("org/other", "Repository")):
        absent = run("sample", name, "--prompt", "x", home=tmp_path, **online)
        assert absent.returncode == 2
        assert absent.stderr.startswith(f"dpo-jax: {name}: no such folder, and the hub has given no such model: ")
        assert reason in absent.stderr or "404" in absent.stderr
        assert absent.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_data_of_a_suite_are_fetched_once(server, shared, tmp_path):
    address, asked = server
    model = shutil.copytree(shared / "models/tinystories-656k", tmp_path / "model")
    suite = ("eval", str(model), "--suite", "alpaca_eval", "--suite_max_new_tokens", "2")
    first = run(*suite, home=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    assert first.returncode == 0, first.stderr
    assert asked == {"/datasets/tatsu-lab/alpaca_eval/resolve/main/alpaca_eval.json"}
    written = next(tmp_path.rglob("model_outputs.json"))
    assert [row["instruction"] for row in json.loads(written.read_text())] == ["Once upon a time", "The dog said"]
    written.unlink()
    again = run(*suite, home=tmp_path, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert len(json.loads(written.read_text())) == 2
    nowhere = run(*suite, home=tmp_path / "model", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("dpo-jax: alpaca_eval: tatsu-lab/alpaca_eval/alpaca_eval.json: cannot be fetched")
    assert "give its file or folder as --suite_data PATH" in nowhere.stderr
    assert nowhere.stderr.count("\n") == 1


def test_without_a_network_the_answer_is_one_line(tmp_path):
    nowhere = run(
        "sample", "org/name", "--prompt", "x", home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0"
    )
    assert nowhere.returncode == 2
    assert nowhere.stderr.startswith("dpo-jax: org/name: no such folder, and the hub has given no such model: ")
    assert nowhere.stderr.count("\n") == 1


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """The folder of `org/name` in an otherwise empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    fetch_model.cache_clear()
    place = tmp_path / "hub/models--org--name"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(COMMIT)
    (place / "snapshots" / COMMIT).mkdir(parents=True)
    yield place / "snapshots" / COMMIT
    fetch_model.cache_clear()


def test_a_name_becomes_the_folder_of_its_copy(cached, caplog, shared):
    caplog.set_level("INFO")
    shutil.copy(shared / "models/tinystories-656k/model.safetensors", cached)
    assert model_folder("org/name") == cached
    assert f"revision {COMMIT}" in caplog.text
    caplog.clear()
    assert model_folder(f"org/name@{COMMIT}") == cached
    assert caplog.text == ""
    with pytest.raises(UserError, match=r"^org/name@other: no such folder, and the hub has given no such model: "):
        model_folder("org/name@other")


def test_a_mistyped_folder_is_answered_with_the_closest(cached, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/dpo").mkdir(parents=True)
    message = r"^runs/dop: no such folder \(did you mean 'dpo'\?, in runs\), and the hub has given no such model: "
    with pytest.raises(UserError, match=message):
        model_folder("runs/dop")


def test_a_config_needs_no_weights(cached):
    (cached / "config.json").write_text("{}")
    assert hub_config_file("org/name") == cached / "config.json"


def test_a_model_that_is_only_a_pickle_is_refused(cached):
    (cached / "config.json").write_text("{}")
    with pytest.raises(UserError, match="org/name: the hub has no safetensors of it, and a pickle is never read"):
        model_folder("org/name")


def test_which_paths_can_be_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    names = ["org/name", "org/name@v1.0", "org/name@refs/pr/1"]
    assert [is_hub_name(name) for name in names] == [True] * 3
    others = ["a/b", "name", "./org/name", "/org/name", "org/name/more", "org/name@", ""]
    assert [is_hub_name(name) for name in others] == [False] * 7
