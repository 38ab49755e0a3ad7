"""Questions, answers, and ranks that give none."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from shardwise.errors import CheckFailed
from shardwise.launch.preflight import board as board_room
from shardwise.launch.preflight.api import join
from shardwise.launch.preflight.board import Answer, Board, Place, within


def double(place: Place, board: Board, seconds: float, value: int) -> int:
    assert seconds > 0 and board.place == place
    if value == 13:
        raise CheckFailed("unlucky")
    if value == 14:
        raise KeyError("lost")
    return value * 2 + place.rank


def hang(place: Place, board: Board, seconds: float) -> None:
    if place.rank == 1:
        threading.Event().wait(60)


def board(store: Any, rank: int, world: int = 3) -> Board:
    return Board(
        store, Place(rank, world, rank, 0, 1, f"n{rank}"), {"double": double, "hang": hang}
    )


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """Rank 0 of three; rank 1 serves, rank 2 is not there."""
    monkeypatch.setattr(board_room, "_SLACK", 0.2)
    store = dist.HashStore()
    thread = threading.Thread(target=board(store, 1).serve, daemon=True)
    thread.start()
    zero = board(store, 0)
    yield zero
    zero.end("done")
    thread.join(30)
    assert not thread.is_alive()


def test_answers_and_errors_come_by_rank(first: Board) -> None:
    assert first.ask("double", [0, 1], 30.0, value=4) == {0: Answer(8), 1: Answer(9)}
    assert first.ask("double", [1], 30.0, value=13) == {1: Answer(error="unlucky")}
    assert first.ask("double", [1], 30.0, value=14)[1].error == "KeyError: 'lost'"


def test_who_is_not_there_is_missing_and_not_waited_for_again(first: Board) -> None:
    assert first.ask("double", range(3), 0.5, value=1) == {0: Answer(2), 1: Answer(3)}
    assert first.missing == {2}
    assert first.ask("double", range(3), 30.0, value=2) == {0: Answer(4), 1: Answer(5)}


def test_a_step_that_hangs_is_left_behind(first: Board) -> None:
    answers = first.ask("hang", [0, 1], 0.3)
    assert answers[0] == Answer() and "did not end within" in answers[1].error
    assert first.ask("double", [1], 30.0, value=3) == {1: Answer(7)}  # it goes on


def test_without_rank_0_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_room, "_PATIENCE", 0.1)
    with pytest.raises(CheckFailed, match="rank 1 on n1: rank 0 does not answer"):
        join(dist.HashStore(), Place(1, 2, 1, 0, 1, "n1"), None, ())


def test_steps_run_beside_each_other() -> None:
    meeting = threading.Barrier(2, timeout=30)
    answers = within(30.0, {"a": meeting.wait, "b": meeting.wait, "c": time.monotonic})
    assert {answers["a"].value, answers["b"].value} == {0, 1} and not answers["c"].error


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 0, 1)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"},
            (5, 8, 1, 1, 4),
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "3"},
            (3, 4, 3, 0, 1),
        ),
    ],
)
def test_place(
    environment: dict[str, str], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    place = Place.here()
    assert (place.rank, place.world, place.node, place.local_rank, place.local_world) == expected
    assert place.host == "n7"
