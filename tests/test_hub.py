"""The hub against a stand-in on loopback: names, cache, resume, offline mode, and every refusal."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from puna.checkpoint.hub import licence_of, resolve
from puna.errors import PunaError

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secretsecretsecret"
CARD = b"---\nlicense: other\nlicense_name: llama3.2\n---\n# A card\n"
WEIGHTS = bytes(range(256)) * 2000
SAFETENSORS = {"config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": CARD, "pytorch_model.bin": b"pickle",
               "original/params.json": b"{}", "original/consolidated.00.pth": b"twice"}  # fmt: skip
REPOSITORIES: dict[str, dict[str, bytes]] = {
    "llama/hf": SAFETENSORS,
    "llama/secret": SAFETENSORS,
    "llama/meta": {"README.md": b"no header", "original/params.json": b"{}", "original/consolidated.00.pth": b"pth",
                   "original/tokenizer.model": b"tok"},
    "llama/gguf": {"README.md": CARD, "m-Q4_0.gguf": b"GGUF4", "m-Q8_0.gguf": b"GGUF8"},
    "llama/one": {"m.gguf": b"GGUF"},
    "llama/empty": {"pytorch_model.bin": b"pickle"},
}  # fmt: skip


class Hub(http.server.ThreadingHTTPServer):
    """The routes that huggingface_hub uses to download a model repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Routes)
        self.log: list[str] = []  # "GET path" of every request
        self.ranges: list[str] = []
        self.cuts: list[int] = []  # after how many bytes the next connections for a weights file break off
        self.status: int | None = None  # answer to everything

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        return [line.split("/resolve/")[1].split("/", 1)[1] for line in self.log
                if line.startswith("GET") and "/resolve/" in line]  # fmt: skip


class _Routes(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.server.log.append(f"{self.command} {self.path}")
        if self.server.status is not None:
            return self._send(self.server.status, b"{}")
        parts = self.path.split("?")[0].strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
        if repo == "llama/secret" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if repo not in REPOSITORIES:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no repository"})
        contents = REPOSITORIES[repo]
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"})
        if api and rest[:1] in ([], ["revision"]):
            names = [{"rfilename": name} for name in contents]
            return self._json({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": names})
        if api and rest[0] == "tree":
            return self._json([{"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                               for name, data in contents.items()])  # fmt: skip
        name = "/".join(rest[2:])
        if name not in contents:
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self._file(contents[name])

    def _file(self, data: bytes) -> None:
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, wanted = 200, data
        if (asked := self.headers.get("Range")) is not None:
            self.server.ranges.append(asked)
            first = int(asked.removeprefix("bytes=").rstrip("-"))
            status, wanted = 206, data[first:]
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cuts = self.server.cuts if len(data) > 1000 and self.command == "GET" else []
        self._send(status, wanted, headers, cuts.pop(0) if cuts else None)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_pull_takes_safetensors_and_nothing_twice(hub):
    folder = resolve("llama/hf")
    assert contents(folder) == {"config.json", "model.safetensors", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert licence_of(folder) == "llama3.2"
    hub.log.clear()
    assert resolve("llama/hf") == folder
    assert hub.downloads() == []


def test_a_commit_in_the_cache_needs_no_request_at_all(hub):
    folder = resolve("llama/hf", COMMIT)
    hub.log.clear()
    assert resolve("llama/hf", COMMIT) == folder
    assert hub.log == []


def test_meta_files_only_where_there_are_no_safetensors(hub):
    folder = resolve("llama/meta")
    assert folder.name == "original"
    assert contents(folder) == {"params.json", "consolidated.00.pth", "tokenizer.model"}
    assert licence_of(folder) is None


def test_gguf_repositories(hub):
    path = resolve("llama/gguf:m-Q8_0.gguf")
    assert path.read_bytes() == b"GGUF8"
    assert licence_of(path) == "llama3.2"
    assert "m-Q4_0.gguf" not in hub.downloads()
    assert resolve("llama/one").read_bytes() == b"GGUF"
    with pytest.raises(PunaError, match=r"Choose one of its GGUF files: llama/gguf:m-Q4_0\.gguf, llama/gguf:m-Q8_0"):
        resolve("llama/gguf")
    with pytest.raises(PunaError, match=r"llama/gguf has no file 'x\.gguf'\. Choose one of"):
        resolve("llama/gguf:x.gguf")
    with pytest.raises(PunaError, match=r"llama/empty has no safetensors .* no GGUF file either"):
        resolve("llama/empty")


@pytest.mark.parametrize("name", ["llama/hf", "llama/gguf:m-Q8_0.gguf", "llama/meta", "llama/one"])
def test_offline_uses_the_cache(name, hub, monkeypatch):
    path = resolve(name)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(name) == path
    assert hub.log == []


def test_offline_and_not_in_the_cache(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PunaError, match=r"not .completely. in the cache .* HF_HUB_OFFLINE is set"):
        resolve("llama/hf")
    assert hub.log == []


def test_an_interrupted_download_goes_on_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its own attempts
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.cuts = [100_000] * 3
    folder = resolve("llama/hf")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == ["bytes=100000-", "bytes=200000-", "bytes=300000-"]


def test_a_download_that_broke_off_keeps_complete_files_and_no_half_ones(hub, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.cuts = [0] * 9
    with pytest.raises(PunaError, match=r"llama/hf: the download .* broke off .* Pull again"):
        resolve("llama/hf")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name == "model.safetensors" or "incomplete" in p.name]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PunaError, match=r"not .completely. in the cache"):
        resolve("llama/hf")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.cuts.clear()
    hub.log.clear()
    assert (resolve("llama/hf") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloads() == ["model.safetensors"]


@pytest.mark.parametrize(("name", "revision", "message"), [
    ("llama/none", None, "no such file or folder here, and no such repository on 127.0.0.1"),
    ("llama/hf", "v9", "llama/hf has no revision 'v9'"),
    ("llama/secret", None, "llama/secret is gated. Accept its licence .* `hf auth login`"),
    ("llama/h..f", None, "no name of a hub repository"),
    ("llama", None, "no file or folder here, and no bundled model. .* 'cria', or a hub repository as 'org/name'"),
    ("./llama/hf", None, "no file or folder here"),
    ("a/b/c.gguf", None, "no file or folder here"),
    ("", None, "no file or folder here"),
    ("a" * 5000, None, "no file or folder here"),
])  # fmt: skip
def test_names_that_lead_nowhere(name, revision, message, hub):
    with pytest.raises(PunaError, match=message):
        resolve(name, revision)


@pytest.mark.parametrize(("status", "message"), [(401, "refuses|no such repository"), (403, "refuses access .*403"),
                                                 (500, "answered 500")])  # fmt: skip
def test_refusals(status, message, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.status = status
    with pytest.raises(PunaError, match=message):
        resolve("llama/hf")


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(PunaError, match=r"not in the cache, and 127\.0\.0\.1 cannot be reached"):
        resolve("llama/hf")


def test_a_token_opens_a_gated_repository_and_is_never_shown(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (resolve("llama/secret") / "model.safetensors").is_file()
    hub.status = 403
    with pytest.raises(PunaError) as caught:
        resolve("llama/one")
    assert TOKEN not in str(caught.value)


def test_paths_and_the_bundled_model(tmp_path, hub, monkeypatch):
    (tmp_path / "model.gguf").touch()
    assert resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"
    monkeypatch.setattr("puna.checkpoint.hub.files", lambda package: tmp_path / package)
    with pytest.raises(PunaError, match="'cria' is missing from this installation"):
        resolve("cria")
    (tmp_path / "puna" / "data" / "cria").mkdir(parents=True)
    assert resolve("cria") == tmp_path / "puna" / "data" / "cria"
    assert hub.log == []


def test_pull_command_in_a_process_of_its_own(hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE come from the environment."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    pull = [sys.executable, "-m", "puna", "pull", "llama/hf", "--json"]
    first = subprocess.run(pull, env=environment, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    assert answer["bytes"] == len(WEIGHTS) + len(CARD) + 2
    assert answer["license"] == "llama3.2"
    assert Path(answer["path"]).is_relative_to(tmp_path / "home")
    hub.log.clear()
    offline = subprocess.run(pull, env={**environment, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
                             timeout=120)  # fmt: skip
    assert json.loads(offline.stdout) == answer
    assert hub.log == []


def test_pull_command_says_where_how_much_and_under_which_licence(hub):
    from puna.cli.main import app

    run = CliRunner().invoke(app, ["pull", "llama/hf"])
    lines = run.stdout.splitlines()
    assert lines[0].endswith(COMMIT)
    assert lines[1] == f"{len(WEIGHTS) + len(CARD) + 2:,} bytes"
    assert lines[2] == "licence: llama3.2"
