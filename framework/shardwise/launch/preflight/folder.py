"""Whether the run's folder is one folder: what a node writes there, rank 0 reads, and back."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from shardwise.errors import CheckFailed
from shardwise.launch.preflight.board import Board, Deadline, Place
from shardwise.storage.durable import explain, make_folder

_POLL_SECONDS = 0.1


def sign(place: Place, board: Board, seconds: float, folder: str, token: str) -> None:
    """Write this node's mark; rank 0, who is asked first, makes the folder. Raises CheckFailed."""
    del board, seconds
    mark = _mark(folder, token, place.node)
    try:
        if place.rank == 0:
            make_folder(mark.parent)
        mark.write_text(token)
    except OSError as error:
        if place.rank and isinstance(error, FileNotFoundError):
            raise CheckFailed(f"{folder} is not there, though rank 0 made it") from None
        raise CheckFailed(explain(error, folder)) from None


def look(
    place: Place, board: Board, seconds: float, folder: str, token: str, nodes: list[int]
) -> list[int]:
    """The nodes whose marks are not seen here; others than rank 0 look for its mark only."""
    del board
    deadline = Deadline(seconds)
    unseen = nodes if place.rank == 0 else [0]
    while unseen := [node for node in unseen if not _seen(_mark(folder, token, node), token)]:
        if not deadline.left():
            break
        time.sleep(_POLL_SECONDS)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # noqa: PTH208  # has NFS look again for names that it missed
    return unseen


def clean(place: Place, board: Board, seconds: float, folder: str, token: str) -> None:
    """Take this node's mark away."""
    del board, seconds
    with contextlib.suppress(OSError):
        _mark(folder, token, place.node).unlink(missing_ok=True)


def _mark(folder: str, token: str, node: int) -> Path:
    return Path(folder, f".preflight-{token}-{node}")


def _seen(mark: Path, token: str) -> bool:
    try:
        return mark.read_text() == token
    except OSError:
        return False
