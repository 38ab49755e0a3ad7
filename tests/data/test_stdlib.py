"""The embedded corpus: the same rule on every machine, checked against a plain restatement."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

import pytest

from shardwise.data.stdlib import read_stdlib, stdlib_files, stdlib_folder
from shardwise.errors import DataError


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for i in range(50):
        folder = tmp_path / f"pkg{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"m{i}.py").write_text(f"x = {i}\n")
    for name in ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"):
        for folder in (tmp_path / name, tmp_path / "pkg0" / name):
            folder.mkdir()
            (folder / "out.py").write_text("raise SystemExit\n")
    (tmp_path / "pkg1" / "test.py").write_text("a module, not a folder\n")
    (tmp_path / "pkg1" / "data.txt").write_text("no source\n")
    return tmp_path


def test_split(library: Path) -> None:
    names = [p.relative_to(library).as_posix() for p in stdlib_files("all", library)]
    assert names == sorted([*(f"pkg{i % 3}/m{i}.py" for i in range(50)), "pkg1/test.py"])
    lowest = sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())[:40]
    held = [p.relative_to(library).as_posix() for p in stdlib_files("validation", library)]
    assert held == sorted(lowest)
    train = [p.relative_to(library).as_posix() for p in stdlib_files("train", library)]
    assert sorted(train + held) == names


def test_modules_of_like_sizes_are_held_out_first(library: Path) -> None:
    """Their bytes weigh about as much; one file of prose was once three quarters of them."""
    sizes = {f"pkg{i % 3}/m{i}.py": 4095 + i for i in range(45)}
    sizes |= {"pkg1/m46.py": 20 << 10, "pkg2/m47.py": (20 << 10) + 1}
    for name, size in sizes.items():
        (library / name).write_text("#" * size)
    held = {p.relative_to(library).as_posix() for p in stdlib_files("validation", library)}
    assert len(held) == 40
    assert all(4 << 10 <= sizes[name] <= 20 << 10 for name in held)


def test_exclude_comes_before_the_split(library: Path) -> None:
    held = stdlib_files("validation", library, exclude=["pkg0/m1*"])
    assert len(held) == 40 and not any(p.match("pkg0/m1*") for p in held)


def test_the_running_library() -> None:
    documents = list(read_stdlib("validation"))
    assert len(documents) == 40
    sizes = [len(d.raw) for d in documents]
    assert max(sizes) < 0.05 * sum(sizes) and min(sizes) >= 4096
    every = stdlib_files()
    assert stdlib_folder() == Path(sysconfig.get_paths()["stdlib"])
    assert any(p.name == "argparse.py" for p in every)
    assert not any(f"{os.sep}site-packages{os.sep}" in str(p) for p in every)
    for d in documents:  # what is compressed is what is on disk
        assert d.raw == (stdlib_folder() / d.name).read_bytes()


def test_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes("# coding: latin-1\nx = 'é'\n".encode("latin-1"))
    [document] = read_stdlib("all", tmp_path)
    assert document.text.endswith("x = 'é'\n")
    (tmp_path / "latin.py").write_bytes(b"# no coding line\nx = '\xe9'\n")
    with pytest.raises(DataError, match=r"latin\.py: byte 22: not in its declared encoding"):
        list(read_stdlib("all", tmp_path))


def test_no_library(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Python sources"):
        stdlib_files("all", tmp_path)
