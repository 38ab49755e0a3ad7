"""The kernel cache loads what it built, and nothing else; the compiler cannot hold a run up."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise.ops import compiled


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no optimizer that takes time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "_FLAGS", "-O0 -fPIC")
    compiled._loaded.cache_clear()
    compiled._say_once.cache_clear()
    return tmp_path / "cache" / "shardwise" / "kernels"


def source(folder: Path, value: int = 42) -> Path:
    path = folder / f"kernel{value}.cpp"
    path.write_text(f'extern "C" int answer() {{ return {value}; }}\n')
    return path


def answer(path: Path) -> int:
    """What a fresh process would get."""
    return int(compiled._load(path).answer())


def built(place: Path) -> Path:
    (found,) = place.glob("*.so")
    return found


def test_it_is_built_once_and_private(tmp_path: Path, place: Path, builds: list[Path]) -> None:
    assert [answer(source(tmp_path)) for _ in range(3)] == [42] * 3
    assert len(builds) == 1
    for path in (place.parent, place, built(place), built(place).with_suffix(".json")):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The targets that were built."""
    done: list[Path] = []
    build = compiled._build
    monkeypatch.setattr(compiled, "_build", lambda c, s, t: (done.append(t), build(c, s, t)))
    return done


def _evil(place: Path, tmp_path: Path) -> bytes:
    """A sound library of another source, which must never be loaded in this one's place."""
    other = tmp_path / "other.so"
    compiled.run_limited(
        ["g++", "-shared", "-fPIC", str(source(tmp_path, 666)), "-o", str(other)], 60
    )
    return other.read_bytes()


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "replaced": lambda so, evil: (so.unlink(), so.write_bytes(evil)),
    "truncated": lambda so, evil: so.write_bytes(so.read_bytes()[:100]),
    "empty": lambda so, evil: so.write_bytes(b""),
    "a folder": lambda so, evil: (so.unlink(), so.mkdir()),
    "a fifo": lambda so, evil: (so.unlink(), os.mkfifo(so)),
    "a link": lambda so, evil: (so.rename(so.with_name("x")), so.symlink_to(so.with_name("x"))),
    "writable": lambda so, evil: (so.write_bytes(evil), so.chmod(0o777)),
    "no note": lambda so, evil: (so.write_bytes(evil), so.with_suffix(".json").unlink()),
    "bad note": lambda so, evil: so.with_suffix(".json").write_text("[" * 10_000),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_not_built_here_is_built_again(
    tmp_path: Path, place: Path, builds: list[Path], damage: str
) -> None:
    path = source(tmp_path)
    so = place / f"kernel42-{compiled._key(compiled._compiler(), path)}.so"
    place.mkdir(parents=True, mode=0o700)
    place.parent.chmod(0o700)
    compiled._build(compiled._compiler(), path, so)
    builds.clear()
    DAMAGES[damage](so, _evil(place, tmp_path))
    if damage == "a folder":
        with pytest.raises(OSError, match="directory"):  # ours, but not ours to delete
            answer(path)
        return
    assert answer(path) == 42
    assert builds == [so]


def test_an_unloadable_library_with_a_sound_note_is_built_again(
    tmp_path: Path, place: Path, builds: list[Path]
) -> None:
    path = source(tmp_path)
    place.mkdir(parents=True, mode=0o700)
    so = place / f"kernel42-{compiled._key(compiled._compiler(), path)}.so"
    so.write_bytes(b"\x7fELF of another machine")
    compiled._note(so, compiled.integrity.entry(so.read_bytes()))
    assert answer(path) == 42 and builds == [so]


@pytest.mark.parametrize("which", ["kernels", "shardwise"])
@pytest.mark.parametrize("how", ["others write", "a link", "another's"])
def test_a_folder_that_is_not_ours_alone_is_not_used(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, which: str, how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    place.mkdir(parents=True)
    folder = place if which == "kernels" else place.parent
    if how == "others write":
        folder.chmod(0o777)
    elif how == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    for _ in range(2):
        with pytest.raises(compiled.CannotBuildError, match="not trusted; remove it, or set XDG"):
            compiled.load(source(tmp_path))
    assert len(caplog.records) == 1 and "PyTorch's are" in caplog.text


def test_all_it_is_made_from_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keys = source(tmp_path), set()

    def note() -> None:
        keys.add(compiled._key(compiled._compiler(), path))

    note()
    path.write_text(path.read_text() + "\n")
    note()
    monkeypatch.setattr(compiled, "_FLAGS", "-O1 -fPIC")
    note()
    monkeypatch.setenv("CPATH", "/elsewhere")
    note()
    monkeypatch.setenv("CXX", "g++ -m64")
    note()
    monkeypatch.setattr(compiled, "_CPU_LINES", ("model name",))
    note()
    assert len(keys) == 6


def _one_of_many(path: Path, place: Path, results: mp.Queue) -> None:
    results.put(compiled._load(path).answer())


def test_concurrent_builders(tmp_path: Path, place: Path) -> None:
    context = mp.get_context("fork")
    results = context.Queue()
    path = source(tmp_path)
    workers = [context.Process(target=_one_of_many, args=(path, place, results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=120) for _ in workers] == [42] * 6
    for worker in workers:
        worker.join()
    assert sorted(p.suffix for p in place.iterdir()) == [".json", ".lock", ".so"]


def test_a_slow_compiler_is_killed_with_its_tree(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers --version, then starts a child that would never end, and waits for it."""
    fake, child = tmp_path / "cxx", tmp_path / "child"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo 1; exit; }\n'
        f"sleep 1000 & echo $! > {child}\nwait\n"
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setattr(compiled, "BUILD_SECONDS", 3.0)
    began = time.time()
    for _ in range(2):  # said once, tried once
        with pytest.raises(compiled.CannotBuildError, match="was stopped after"):
            compiled.load(source(tmp_path))
    assert len(caplog.records) == 1 and "PyTorch's are, which are slower" in caplog.text
    until = time.monotonic() + 30  # a killed process may take its time to die
    while alive(int(child.read_text())) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(int(child.read_text()))
    assert not list(place.glob("*.so"))
    # Who waited for that build does not begin it anew; who comes later does.
    target = place / f"kernel42-{compiled._key(compiled._compiler(), source(tmp_path))}.so"
    assert "was stopped" in (compiled._failure(target, since=began) or "")
    assert compiled._failure(target, since=time.time()) is None


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_broken_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(compiled.CannotBuildError, match="false ended with 1"):
        compiled.load(source(tmp_path))


def test_symbols_come_from_the_library_that_was_asked_for(tmp_path: Path) -> None:
    assert {answer(source(tmp_path, v)) for v in (1, 2)} == {1, 2}
    assert isinstance(compiled.load(source(tmp_path, 1)), ctypes.CDLL)
