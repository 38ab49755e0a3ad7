"""A checkpoint from a stranger: nothing of it runs, nothing outside of it is read (row 23).

The attacker can compute hashes, so every case here is properly sealed.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwise import checkpoint
from shardwise.checkpoint import DamagedError, manifest
from shardwise.errors import CheckpointError
from tests.checkpoint.tools import assert_equal, blank, content, save

SHARD = "shard-00000-000.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and seal it anew."""
    document = json.loads((path / "manifest.json").read_text())
    document.pop("xxh3_128")
    change(document)
    (path / "manifest.json").write_bytes(manifest.seal(document))


def register(path: Path, name: str, data: bytes) -> None:
    """Put ``data`` in place of a file, with the right hash in the manifest."""
    (path / name).write_bytes(data)
    entry = {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    rewrite(path, lambda d: d["files"].update({name: entry}))


def assert_refused(path: Path, match: str | None = None) -> None:
    into = blank(content(1))
    with pytest.raises(DamagedError, match=match):
        checkpoint.load(path, into)
    assert not any(t.any() for t in into.values())
    assert checkpoint.verify(path)


class Bomb:
    """Creates a canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.canary),))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = pickle.dumps(Bomb(canary)) + bytes(8192)  # large enough for the manifest
    pickle.loads(payload)  # noqa: S301 (the payload does work)
    canary.rmdir()
    path = save(tmp_path / "root", 1)
    torch.save({"model.norm.weight": Bomb(canary), "x": torch.zeros(4096)}, path / "weights.pt")
    archive = (path / "weights.pt").read_bytes()
    for data in (payload, archive):
        register(path, SHARD, data)
        assert_refused(path, "header")
        register(path, "weights.pt", data)
        assert_refused(path, "header")
    (path / ".metadata").write_bytes(payload)
    (path / "manifest.json").write_bytes(payload)
    assert_refused(path, "manifest.json")
    (path / "manifest.json").unlink()  # a directory as torch.distributed.checkpoint writes it
    with pytest.raises(CheckpointError):
        checkpoint.load(path, blank(content(1)))
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/passwd", "a/../../secret.json", "..", ".", "a//b", "x\0y", ""]
)
def test_file_names_that_leave_the_directory(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "secret.json").write_bytes(b"{}")
    entry = {"size": 2, "xxh3_128": xxhash.xxh3_128_hexdigest(b"{}")}
    rewrite(path, lambda d: d["files"].update({name: entry}))
    assert_refused(path, "not a file name")
    with pytest.raises(DamagedError):
        checkpoint.read_files(path)


def test_symlinks_and_other_files_are_not_followed(tmp_path: Path) -> None:
    path = save(tmp_path / "root", 1)
    for name in ("config.json", SHARD, "manifest.json", "tokenizer"):
        (path / name).rename(tmp_path / name)
        (path / name).symlink_to(tmp_path / name)
        assert_refused(path)
        (path / name).unlink()
        (tmp_path / name).rename(path / name)
    (path / SHARD).unlink()
    os.mkfifo(path / SHARD)  # opening it must not wait for a writer
    assert_refused(path, "not a regular file")


def test_a_step_that_is_a_symlink_is_no_step(tmp_path: Path) -> None:
    target = save(tmp_path / "elsewhere", 2)
    save(tmp_path / "root", 1)
    (tmp_path / "root" / "step_00000002").symlink_to(target)
    assert checkpoint.list_steps(tmp_path / "root") == [1]


def huge(d: dict[str, Any]) -> None:
    entry = d["tensors"]["model.norm.weight"]
    entry["shape"] = [1 << 50]
    entry["chunks"][0]["shape"] = [1 << 50]


def negative(d: dict[str, Any]) -> None:
    d["tensors"]["model.norm.weight"]["chunks"][0]["offset"] = [-20]


def twice(d: dict[str, Any]) -> None:
    chunks = d["tensors"]["model.norm.weight"]["chunks"]
    chunks.append(chunks[0])


def borrowed(d: dict[str, Any]) -> None:
    d["tensors"]["model.norm.weight"]["chunks"][0]["key"] = "model.embed.weight"


def elsewhere(d: dict[str, Any]) -> None:
    d["tensors"]["model.norm.weight"]["chunks"][0]["file"] = "../other.safetensors"


def gap(d: dict[str, Any]) -> None:
    d["tensors"]["model.norm.weight"]["chunks"] = []


@pytest.mark.parametrize("change", [huge, negative, twice, borrowed, elsewhere, gap])
def test_chunks_that_lie(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = save(tmp_path, 1)
    rewrite(path, change)
    assert_refused(path, r"model\.norm\.weight")


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"step": NaN}',
        b'{"step": 1' + b"0" * 5000 + b"}",
        b"\xff\xfe",
        b'"text"',
        b"{}",
        b'{"format": 1, "files": [], "tensors": {}}',
    ],
)
def test_manifests_that_are_not_ours(tmp_path: Path, body: bytes) -> None:
    path = save(tmp_path, 1)
    tail = b'", ' + body[1:]
    seal = b'{"xxh3_128": "' + xxhash.xxh3_128_hexdigest(tail).encode()
    (path / "manifest.json").write_bytes(seal + tail)
    assert_refused(path, "manifest.json")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{" * 10_000,
        b'{"model.norm.weight": {"dtype": "BF16", "shape": [20], "data_offsets": [-40, 0]}}',
        b'{"model.norm.weight": {"dtype": "BF16", "shape": [-20], "data_offsets": [0, 40]}}',
        b'{"model.norm.weight": {"dtype": "BF16", "shape": [1e3], "data_offsets": [0, 40]}}',
        b'{"model.norm.weight": {"dtype": "X", "shape": [20], "data_offsets": [0, 40]}}',
        b'{"model.norm.weight": {"dtype": "BF16", "shape": [9223372036854775807, 4], '
        b'"data_offsets": [0, 40]}}',
        b'{"model.norm.weight": 1}',
    ],
)
def test_headers_that_lie(tmp_path: Path, header: bytes) -> None:
    path = save(tmp_path, 1)
    for length in (len(header), 1 << 63, (1 << 64) - 1):
        register(path, SHARD, length.to_bytes(8, "little") + header + bytes(8192))
        assert_refused(path, "header")


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, item in inner if isinstance(value, dict | list) else ():
        found += places(item, (*path, key)) if isinstance(item, dict | list) else [(*path, key)]
    return found


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_manifest_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any one value of the manifest replaced: a clean error, or exactly the saved tensors."""
    path = save(tmp_path_factory.mktemp("fuzz"), 1)

    def change(document: dict[str, Any]) -> None:
        *where, last = data.draw(st.sampled_from(places(document)))
        inner: Any = document
        for key in where:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(LEAVES)
        else:
            del inner[last]

    rewrite(path, change)
    into = blank(content(1))
    checkpoint.verify(path)
    try:
        checkpoint.load(path, into)
    except CheckpointError:
        return
    assert_equal(into, content(1))
