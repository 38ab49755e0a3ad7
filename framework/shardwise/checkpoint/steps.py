"""The folder of a stage's checkpoints: step directories, `latest.json`, `best.json`.

step_00000100               committed: complete, durable, never changed again
step_00000200.tmp-1f2e      being written, or left by a killed process; never read
step_00000100.old-9ab3      a committed step while its successor of the same name moves in
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shardwise.checkpoint import manifest
from shardwise.checkpoint.files import read_small
from shardwise.checkpoint.manifest import DamagedError
from shardwise.errors import CheckpointError

LATEST = "latest.json"
BEST = "best.json"
_STEP = re.compile(r"step_(\d{8,18})(?:\.(tmp|old)-[0-9A-Za-z-]+)?")
_UNFINISHED = re.compile(r"\.(latest|best)\.json\.tmp-[0-9a-f]+")
log = logging.getLogger(__name__)


def directory_name(step: int) -> str:
    """``step_00000100`` for step 100."""
    if not 0 <= step < 10**18:
        raise CheckpointError(f"step {step} is out of range")
    return f"step_{step:08d}"


def step_of(directory: Path) -> int:
    """The inverse of `directory_name`, for displaced directories too."""
    return int(directory.name.partition(".")[0].removeprefix("step_"))


def committed(root: Path) -> dict[int, Path]:
    """The committed directories under ``root`` by step, in ascending order."""
    found: dict[int, Path] = {}
    displaced: dict[int, Path] = {}
    for entry in _entries(root):
        match = _STEP.fullmatch(entry.name)
        if match and match[2] != "tmp" and entry.is_dir(follow_symlinks=False):
            # a displaced directory counts where a kill came before its successor moved in
            (displaced if match[2] else found)[int(match[1])] = root / entry.name
    return dict(sorted({**displaced, **found}.items()))


def list_steps(root: Path | str) -> list[int]:
    """The steps under ``root`` that are committed, in ascending order; empty without any."""
    return list(committed(Path(root)))


def leftovers(root: Path) -> list[Path]:
    """What killed processes left behind, safe to remove: directories and unfinished pointers."""
    kept = {directory.name for directory in committed(root).values()}

    def stale(entry: os.DirEntry[str]) -> bool:
        ours = _STEP.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        return bool(ours or _UNFINISHED.fullmatch(entry.name)) and entry.name not in kept

    return [root / entry.name for entry in _entries(root) if stale(entry)]


def latest(root: Path | str) -> Path | None:
    """The newest committed checkpoint under ``root``, or None without any.

    The pointer decides, so that a run that went back to an older step stays there. A checkpoint
    that was renamed into place just before a kill, hence has no pointer yet, names the pointer's
    one as its predecessor and wins.
    """
    root = Path(root)
    found = committed(root)
    if not found:
        return None
    pointer = read_pointer(root, LATEST)
    if pointer is None or pointer["step"] not in found:
        if pointer is not None:
            log.warning("%s: step %d is gone; using the newest", root / LATEST, pointer["step"])
        return found[max(found)]
    step = pointer["step"]
    for newer in sorted((s for s in found if s > step), reverse=True):
        try:
            if manifest.read(found[newer]).previous == pointer["manifest"]:
                return found[newer]
        except DamagedError as error:
            log.warning("%s", error)
    return found[step]


def best(root: Path | str) -> Path | None:
    """The checkpoint with the best metric so far, or None."""
    pointer = read_pointer(Path(root), BEST)
    return committed(Path(root)).get(pointer["step"]) if pointer else None


def read_pointer(root: Path, name: str) -> dict[str, Any] | None:
    """A sound pointer file's fields: step, manifest, and metric for the best; else None."""
    path = root / name
    try:
        fields = manifest.unseal(read_small(root, name, 1 << 16), path)
        if type(fields["step"]) is not int or not isinstance(fields["manifest"], str):
            raise DamagedError(f"{path}: not a pointer")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, DamagedError) as error:
        log.warning("%s: unusable pointer (%s); looking at the directories instead", path, error)
        return None
    return fields


def resolve(path: Path | str) -> Path:
    """``path`` if it is a checkpoint, the latest checkpoint if it is a folder of checkpoints."""
    path = Path(path)
    if _STEP.fullmatch(path.name) or (path / manifest.NAME).exists():
        return path  # by its name even if damaged, so that the damage is what is told
    found = latest(path) if path.is_dir() else None
    if found is None:
        raise CheckpointError(
            f"{path}: no checkpoint here; expected {manifest.NAME} or directories step_00000000"
        )
    return found


def surplus(root: Path, keep: int, protect: Collection[int] = ()) -> list[Path]:
    """Committed directories beyond the ``keep`` newest up to the latest, oldest first.

    The latest, the best and ``protect`` are never among them, nor are steps after the latest,
    which a run that went back has not reached again.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least one checkpoint must be kept")
    found = committed(root)
    current = latest(root)
    best_pointer = read_pointer(root, BEST)
    if current is None or (best_pointer is None and (root / BEST).exists()):
        return []  # the best cannot be told: nothing goes before it is known again
    reached = [s for s in found if s <= step_of(current)]
    safe = {*reached[-keep:], *protect, *([best_pointer["step"]] if best_pointer else [])}
    return [found[s] for s in reached if s not in safe]


def _entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
