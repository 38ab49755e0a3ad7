"""Names on the hub: from the library's cache without a network, from an endpoint over HTTP."""

from __future__ import annotations

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

from shardwise import hub
from shardwise.errors import UserError
from shardwise.models import travel, weight_files
from tests.support.hub import HubCache


def test_a_path_stays_a_path(tmp_path: Path) -> None:
    assert hub.local_folder(tmp_path, "model") == tmp_path
    assert hub.local_folder("runs/x", "dataset") == Path("runs/x")
    assert hub.revision_of(tmp_path, "model") is None
    assert hub.pinned(Path("runs/x"), "model") == "runs/x"


def test_a_cached_name_is_found_offline(hub_cache: HubCache) -> None:
    old = hub_cache.add("org/name", {"config.json": b"1"}, revision="v1")
    new = hub_cache.add("org/name", {"config.json": b"22"}, revision="refs/pr/3")
    hub_cache.add("org/name", {"config.json": b"22"})
    assert (hub.local_folder(Path("hf:org/name"), "model") / "config.json").read_bytes() == b"22"
    assert (hub.local_folder("hf:org/name@v1", "model") / "config.json").read_bytes() == b"1"
    assert hub.revision_of("hf:org/name", "model") == new
    assert hub.revision_of("hf:org/name@refs%2Fpr%2F3", "model") == new
    assert hub.pinned("hf:org/name@v1", "model") == f"hf:org/name@{old}"
    assert hub.local_folder(f"hf:org/name@{old}", "model").name == old


def test_a_part_of_a_dataset(hub_cache: HubCache) -> None:
    commit = hub_cache.add("org/data", {"train/a.jsonl": b"{}", "b.txt": b""}, kind="dataset")
    place = hub.local_folder("hf:org/data/train/a.jsonl", "dataset")
    assert place.read_bytes() == b"{}"
    assert hub.pinned("hf:org/data@main/train", "dataset") == f"hf:org/data@{commit}/train"
    with pytest.raises(UserError, match=r"hf:org/data/test: org/data has no test"):
        hub.local_folder("hf:org/data/test", "dataset")
    with pytest.raises(UserError, match="not in the cache"):  # a dataset is no model
        hub.local_folder("hf:org/data", "model")


def test_what_a_process_has_seen_stays(hub_cache: HubCache) -> None:
    first = hub_cache.add("org/name", {"config.json": b"1"})
    assert hub.revision_of("hf:org/name", "model") == first
    assert hub_cache.add("org/name", {"config.json": b"2"}) != first
    assert hub.revision_of("hf:org/name", "model") == first


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("hf:org/none", "not in the cache .* HF_HUB_OFFLINE .*: hf download org/none$"),
        ("hf:org/name@v9", "hf:org/name@v9: it is not in the cache"),
        ("hf:name", "write hf:org/name"),
        ("hf:org/name@", "write hf:org/name"),
        ("hf:org/name/../../x", "write hf:org/name"),
        ("hf:org/" + "x" * 200, "cannot be fetched: .*"),
    ],
)
def test_what_cannot_be_had(hub_cache: HubCache, ref: str, words: str) -> None:
    hub_cache.add("org/name", {"config.json": b"1"})
    with pytest.raises(UserError, match=words) as error:
        hub.local_folder(ref, "model")
    assert str(error.value).startswith(f"{ref}: ") and error.value.exit_code == 2


def test_every_file_that_is_read_of_a_model_is_fetched() -> None:
    read = {*travel.ALL, weight_files.SINGLE, weight_files.INDEX, "adapter_model.safetensors"}
    assert read - set(hub._FILES["model"]) == set()


# --- over HTTP -----------------------------------------------------------------------------------

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling.py": b"code",
    "original/config.json": b"{}",
}
COMMIT = "ab" * 20


class _Hub(BaseHTTPRequestHandler):
    """What `snapshot_download` asks of an endpoint."""

    asked: list[str] = []

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if path in ("/api/models/org/name/revision/main", "/api/models/org/name"):
            return self._json({"id": "org/name", "sha": COMMIT, "siblings": []})
        if path == f"/api/models/org/name/tree/{COMMIT}":
            return self._json(
                [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in FILES.items()
                ]
            )
        prefix = f"/org/name/resolve/{COMMIT}/"
        if path.startswith(prefix) and path[len(prefix) :] in FILES:
            data = FILES[path[len(prefix) :]]
            etag = hashlib.sha1(data).hexdigest()
            return self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        code = "RevisionNotFound" if "/org/name/" in path else "RepoNotFound"
        return self._answer(404, b"", {"X-Error-Code": code})

    do_HEAD = do_GET

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    _Hub.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


SCRIPT = """
import sys
from shardwise import hub
for ref in sys.argv[1:]:
    try:
        print(hub.local_folder(ref, "model"), hub.revision_of(ref, "model"))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def _in_a_process(home: Path, endpoint: str, *refs: str) -> list[str]:
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, *refs], env=env, check=True, capture_output=True, text=True
    )
    return told.stdout.splitlines()


def test_only_what_is_read_is_fetched_and_once(tmp_path: Path, endpoint: str) -> None:
    home = tmp_path / "home"
    refs = ("hf:org/name", "hf:org/name@v9", "hf:org/other")
    found, no_revision, no_name = _in_a_process(home, endpoint, *refs)
    folder, commit = found.split()
    there = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}
    assert there == {"config.json", "model.safetensors"} and commit == COMMIT
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"
    assert no_revision == "UserError: hf:org/name@v9: org/name has no revision v9"
    assert no_name.startswith(f"UserError: hf:org/other: {endpoint} has no model of this name")
    fetched = [p for p in _Hub.asked if "/resolve/" in p]
    # Without a network at all, what was fetched is still there.
    assert _in_a_process(home, "http://127.0.0.1:9", "hf:org/name") == [found]
    assert [p for p in _Hub.asked if "/resolve/" in p] == fetched
