"""Files of a path, and their hash."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.data import files
from shardwise.errors import DataError


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/d.md", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(path: Path, *suffixes: str) -> list[str]:
        return [p.relative_to(tmp_path).as_posix() for p in files.find_files(path, suffixes)]

    assert names(tmp_path) == ["a.txt", "b.txt", "sub/c.txt", "sub/d.md"]
    assert names(tmp_path, ".md") == ["sub/d.md"]
    (tmp_path / "sub" / "e.MD").write_text("")
    assert names(tmp_path, ".md") == ["sub/d.md", "sub/e.MD"]
    assert names(tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path / "**" / "*.txt", ".ignored") == ["a.txt", "b.txt", "sub/c.txt"]
    with pytest.raises(DataError, match=r"nowhere: no such file"):
        files.find_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no files ending in \.jsonl"):
        files.find_files(tmp_path, [".jsonl"])


def test_fingerprint_follows_content_not_place(tmp_path: Path) -> None:
    for folder, text in (("x", "1"), ("y", "1"), ("z", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "f.txt").write_text(text)
    x, y, z = (files.fingerprint([tmp_path / f / "f.txt"]) for f in "xyz")
    assert x == y != z


def names(found: list[Path], root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in found]


def make(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_hidden_folders_hold_no_data(tmp_path: Path) -> None:
    root = tmp_path / ".corpus"  # what the user names may be hidden
    make(root, "a.txt", ".git/logs/HEAD", "sub/.cache/b.txt", "sub/c.txt", ".d.txt")
    assert names(files.find_files(root), root) == ["a.txt", "sub/c.txt"]
    assert names(files.find_files(root / "**" / "*.txt"), root) == ["a.txt", "sub/c.txt"]
    assert names(files.find_files(root / ".git" / "logs"), root) == [".git/logs/HEAD"]


def test_links_are_followed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, "in/a.txt", "out/b.txt")
    (tmp_path / "in" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "far").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "z.txt").symlink_to(tmp_path / "in" / "a.txt")
    assert names(files.find_files(tmp_path / "in"), tmp_path) == ["in/a.txt", "in/far/b.txt"]
    assert "z.txt: the same file as" in caplog.text
    (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt: the link leads nowhere"):
        files.find_files(tmp_path / "in")


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt", "d*/x.txt", "dd/y.txt")
    assert names(files.find_files(tmp_path / "a[1].txt"), tmp_path) == ["a[1].txt"]
    assert names(files.find_files(tmp_path / "d*"), tmp_path) == ["d*/x.txt"]
    assert names(files.find_files(tmp_path / "d?"), tmp_path) == ["d*/x.txt", "dd/y.txt"]


def test_compressed_files_go_by_what_they_hold(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl.gz", "b.JSONL.ZST", "c.gz", "d.txt.xz", "e.jsonl")
    found = files.find_files(tmp_path, [".jsonl"])
    assert names(found, tmp_path) == ["a.jsonl.gz", "b.JSONL.ZST", "e.jsonl"]
