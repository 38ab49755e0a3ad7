"""A cache of the Hugging Face hub as its library lays it out, filled without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


class HubCache:
    """``folder`` is the library's cache; `add` puts a commit of a repository there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes] | Path,
        kind: str = "model",
        revision: str = "main",
    ) -> str:
        """The commit (a hash of ``files``, or of those of a folder) that ``revision`` now means."""
        if isinstance(files, Path):
            found = [p for p in sorted(files.rglob("*")) if p.is_file()]
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in found}
        root = self.folder / f"{kind}s--{repo.replace('/', '--')}"
        told = b"".join(n.encode() + hashlib.sha1(d).digest() for n, d in sorted(files.items()))
        commit = hashlib.sha1(told).hexdigest()
        for name, data in files.items():
            blob = root / "blobs" / hashlib.sha256(data).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(data)
            place = root / "snapshots" / commit / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(blob)
        ref = root / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        return commit
