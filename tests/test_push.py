"""`dpo-jax export --push`: uploads to a local stand-in of the hub's HTTP API, and what stops one."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

import dpo_jax
from dpo_jax.errors import UserError
from dpo_jax.models.huggingface.hub import check_push, push_folder

TOKEN = "hf_test"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's use of httpx


class UploadHub:
    """Repositories by name: their visibility, their files, and the messages of their commits."""

    def __init__(self):
        self.visibility, self.files, self.commits, self.blobs, self.fails = {}, {}, [], {}, {}

    def answer(self, path, body, address):
        """Returns (status, JSON) of a POST, as the hub does."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            exists = name in self.visibility
            self.visibility.setdefault(name, asked.get("visibility", "public"))
            return (409 if exists else 200), {"url": f"{address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [{"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False} for n in names]
            return 200, {"files": files}
        if path.endswith(".git/info/lfs/objects/batch"):
            upload = {"actions": {"upload": {"href": f"{address}/blob"}}}
            return 200, {"transfer": "basic", "objects": [o | upload for o in json.loads(body)["objects"]]}
        assert path.endswith("/commit/main"), path
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "deletedFile":
                del self.files[name][value["path"]]
            else:
                lfs = line["key"] == "lfsFile"
                content = self.blobs[value["oid"]] if lfs else base64.b64decode(value["content"])
                self.files.setdefault(name, {})[value["path"]] = content
        return 200, {"commitUrl": f"{address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


@pytest.fixture
def hub(monkeypatch):
    """A running stand-in, to which huggingface_hub is pointed with a token."""
    found = UploadHub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def body(self):
            if "Content-Length" in self.headers:
                return self.rfile.read(int(self.headers["Content-Length"]))
            parts = []  # chunked
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def do_POST(self):
            body, path = self.body(), self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.reply(401, {"error": "Invalid username or password."})
            if failure := next((why for part, why in found.fails.items() if part in path), None):
                return self.reply(403, {"error": failure})
            return self.reply(*found.answer(path, body, address))

        def do_GET(self):
            name, _, rest = self.path.removeprefix("/api/models/").partition("/tree/main")
            if not rest:
                return self.reply(404, {"error": "Repository not found"})
            files = [{"type": "file", "path": p, "size": 1, "oid": "0" * 40} for p in found.files.get(name, {})]
            return self.reply(200, files)

        def do_PUT(self):
            body = self.body()
            found.blobs[hashlib.sha256(body).hexdigest()] = body
            self.reply(200, {})

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(shared, tmp_path):
    model, params, tokenizer = dpo_jax.load_model(shared / "models/stories260k")
    return dpo_jax.save_model(tmp_path / "out", model, params, tokenizer, dtype="float16")


def test_every_file_is_uploaded_to_a_private_repository(hub, folder):
    check_push("me/stories")
    assert push_folder(folder, "me/stories").endswith("/me/stories")
    assert hub.visibility == {"me/stories": "private"}
    assert hub.files["me/stories"] == {f.name: f.read_bytes() for f in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files["me/stories"].keys()
    assert hub.commits == ["Upload a model of dpo_jax"]


def test_a_repository_that_exists_keeps_its_visibility(hub, folder):
    push_folder(folder, "me/stories", public=True)
    stale = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    hub.files["me/stories"] |= stale  # weights of an earlier upload, which readers would prefer
    push_folder(folder, "me/stories")
    assert hub.visibility == {"me/stories": "public"}
    assert len(hub.commits) == 2
    assert hub.files["me/stories"].keys() == {f.name for f in folder.iterdir()} | {"notes.txt"}


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(hub, folder, monkeypatch):
    hub.fails["/commit/"] = "You may not write here."
    again = rf"; {folder} is complete, upload it with hf upload me/stories {folder}$"
    with pytest.raises(UserError, match=rf"^--push me/stories: .*You may not write here\..*{again}") as found:
        push_folder(folder, "me/stories")
    assert "\n" not in str(found.value)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match=r"^--push me/stories: .*401.*Invalid username or password") as found:
        push_folder(folder, "me/stories")
    assert "hf_other" not in str(found.value)
    assert (folder / "model.safetensors").is_file()


def test_without_a_network_it_is_one_line(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^--push me/stories: .*(refused|denied|connect).*is complete"):
        push_folder(folder, "me/stories")


@pytest.mark.parametrize("name", ["stories", "me/stories@v1", "a/b/c", "../stories/", ""])
def test_a_name_without_an_owner_is_refused(hub, name):
    with pytest.raises(UserError, match=r"no repository of the hub; write owner/name$"):
        check_push(name)


def test_without_a_token_or_offline_it_is_refused_before_the_work(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"^--push: no token of the hub; log in with hf auth login, or set HF_TOKEN"):
        check_push("me/stories")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^--push: HF_HUB_OFFLINE is set, which forbids the network; unset it$"):
        check_push("me/stories")
