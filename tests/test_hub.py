"""Names of models instead of folders, against a hub of one model on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import tiny
from slidesparse.errors import CheckpointError

pytest.importorskip("huggingface_hub")

COMMIT = "a" * 40
PROGRAM = """
import sys
from slidesparse.errors import CheckpointError
from slidesparse.integrations.hub import model_folder
try:
    print(model_folder(sys.argv[1]))
except CheckpointError as error:
    print("refused:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves the files of ``folder`` as ``org/tiny`` at ``main`` and ``v1``; counts what is asked."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        self.asked.append(self.path)
        files = sorted(path.name for path in self.folder.iterdir())
        if self.path.split("?")[0] in (f"/api/models/org/tiny/revision/{revision}" for revision in ("main", "v1", COMMIT)):
            said = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files], "private": False, "tags": []}
            return self.answer(json.dumps(said).encode(), body)
        if self.path.startswith(f"/api/models/org/tiny/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": name} for name in files]
            return self.answer(json.dumps(tree).encode(), body)
        if self.path.startswith("/api/models/org/tiny"):
            return self.refuse("RevisionNotFound")
        name = self.path.rpartition("/")[2]
        if self.path.startswith("/org/tiny/resolve/") and name in files:
            return self.answer((self.folder / name).read_bytes(), body)
        return self.refuse("RepoNotFound")

    def answer(self, data: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    source = tmp_path / "source"
    tiny.build(source)
    (source / "tokenizer_config.json").write_text("{}")  # a model in the cache without one is fetched again
    handler = type("Handler", (Hub,), {"folder": source, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(hub: ThreadingHTTPServer, name: str, folder: Path, **more: str) -> str:
    """In a process of its own: the hub's address is read when the library is imported."""
    places = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, env=os.environ | places | more, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_name_is_fetched_once_and_then_taken_from_the_cache(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    asked = hub.RequestHandlerClass.asked
    found = Path(ask(hub, "org/tiny", tmp_path))
    for file in (tmp_path / "source").iterdir():
        assert (found / file.name).read_bytes() == file.read_bytes()
    count = len(asked)
    assert count and Path(ask(hub, "org/tiny", tmp_path)) == found and len(asked) == count
    assert Path(ask(hub, "org/tiny@v1", tmp_path)) == found and len(asked) > count  # the same commit under another name
    weights = next(found.glob("*.safetensors"))
    weights.unlink()  # half a model is fetched anew
    assert Path(ask(hub, "org/tiny", tmp_path)) == found and weights.exists()


def test_commands_take_a_name(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    places = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    program = "from slidesparse.cli import main; main()"
    for words, code, told in (
        (["inspect", "org/tiny"], 0, "q_proj"),
        (["convert", "org/none", "out"], 1, "the hub knows no model org/none"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, env=os.environ | places, cwd=tmp_path, check=False
        )
        assert done.returncode == code and told in done.stdout + done.stderr and "Traceback" not in done.stderr
        if told == "there exists already":
            assert not hub.RequestHandlerClass.asked, "nothing is fetched for an output that cannot be written"


def test_a_folder_of_that_name_wins(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert ask(hub, "org/tiny", tmp_path) == "org/tiny"
    assert ask(hub, "./org/other", tmp_path) == "org/other" and not hub.RequestHandlerClass.asked


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("org/unknown", {}, "the hub knows no model org/unknown"),
        ("org/tiny@v9", {}, "org/tiny has no revision v9"),
        ("org/tiny", {"HF_HUB_OFFLINE": "1"}, "cannot be reached to download it"),
        ("org/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached to download it"),
    ],
)
def test_what_the_hub_does_not_give_is_one_clear_line(hub, tmp_path: Path, name: str, more: dict[str, str], told: str) -> None:
    answer = ask(hub, name, tmp_path, **more)
    assert answer.startswith(f"refused: {name} is no folder here, and ") and told in answer and "\n" not in answer


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("https://huggingface.co/org/tiny/tree/main", "is an address: give the model's name on the hub, org/tiny"),
        ("hf://org/tiny", "is an address: give the model's name on the hub, org/tiny"),
    ],
)
def test_what_is_nearly_a_name_is_told_apart(hub, tmp_path: Path, name: str, told: str) -> None:
    assert told in ask(hub, name, tmp_path) and not hub.RequestHandlerClass.asked


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_hub(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = ask(hub, "org/tiny", tmp_path, HF_HOME=str(tmp_path / "file" / "home"))
    told = f"the cache {tmp_path}/file/home/hub cannot be written (Not a directory): make room there, or set HF_HOME to another folder"
    assert answer == f"refused: org/tiny is no folder here, and {told}"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_a_disk_answers_is_told(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from slidesparse.integrations import hub

    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    for ask_for in (hub.model_folder, hub.config_file):
        with pytest.raises(CheckpointError, match=rf"the cache .* cannot be written \({os.strerror(code)}\): .*HF_HOME"):
            ask_for("org/tiny")


def test_functions_take_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slidesparse
    from slidesparse.integrations import hub

    monkeypatch.setattr(hub, "_cached", lambda name, revision: {("org/tiny", "v1"): tmp_path / "dense"}.get((name, revision)))
    tiny.add_tokenizer(tiny.build(tmp_path / "dense"))
    slidesparse.convert("org/tiny@v1", tmp_path / "packed", slidesparse.Recipe(tiny.SIX, "magnitude"))
    assert type(slidesparse.load("org/tiny@v1", device="cpu")[0]).__name__ == "LlamaForCausalLM"
    assert slidesparse.verify(tmp_path / "packed", "org/tiny@v1").ok
