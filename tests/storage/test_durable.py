"""Files that are old or new, never a part; faults of the storage that name file and mend."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.storage import durable
from shardwise.storage.durable import StorageError, told, write_durably


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in order, as names of the paths."""
    seen: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(file: int) -> None:
        seen.append("sync " + Path(f"/proc/self/fd/{file}").readlink().name)
        sync(file)

    def rename(self: Path, target: Path) -> Path:
        seen.append(f"name {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    return seen


def test_bytes_first_then_the_name_and_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = recorded(monkeypatch)
    write_durably(tmp_path / "a" / "b" / "f.json", b"new")
    assert seen[:2] == [f"sync {tmp_path.name}", "sync a"]
    assert seen[2].startswith("sync .f.json.tmp-") and seen[3:] == ["name f.json", "sync b"]
    assert (tmp_path / "a/b/f.json").read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_durably(tmp_path / "f", b"old")

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"/f: disk full; free some space"):
        write_durably(tmp_path / "f", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_a_folder_in_the_place_of_a_file_is_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "f").mkdir()
        write_durably(tmp_path / "f", b"new")
        (tmp_path / "f").unlink()
        assert (tmp_path / f"f.damaged-{number}").is_dir()


@given(st.sampled_from(sorted(durable.FAULTS)), st.integers(0, 3))
def test_a_fault_is_told_however_deep_it_lies(number: int, depth: int) -> None:
    def fail(left: int) -> None:
        if left == 0:
            raise OSError(number, os.strerror(number), "/run/metrics.jsonl")
        try:
            fail(left - 1)
        except Exception as error:
            raise RuntimeError("a library's words") from error

    with pytest.raises(StorageError, match=r"^/run/metrics\.jsonl: ") as raised, told("/run"):
        fail(depth)
    assert raised.value.exit_code == 1


def test_what_is_no_fault_of_the_storage_stays_what_it_is() -> None:
    for error in (FileNotFoundError(2, "no", "f"), ValueError("x"), ConfigError("key")):
        with pytest.raises(type(error)), told("/run"):
            raise error
    with pytest.raises(StorageError, match="/run: disk full"), told("/run"):
        raise Exception("I/O error: No space left on device (os error 28)")
