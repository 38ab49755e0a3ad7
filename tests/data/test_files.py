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
