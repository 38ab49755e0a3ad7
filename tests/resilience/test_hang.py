"""A run that stands still names the rank at fault; one that works or waits is left alone."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shardwise.config.schema import ResilienceConfig
from shardwise.errors import ShardwiseError
from shardwise.resilience import ending, hang, sequence, stop
from shardwise.resilience.gate import Gate
from shardwise.resilience.sequence import Call, Collectives
from tests.launch.test_local import Launcher
from tests.resilience import faults
from tests.support.daily import daily


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("stopped", "rank 1 is stopped (SIGSTOP"),
        pytest.param(
            "asleep",
            "rank 1 holds the interpreter (the GIL) and sleeps",
            marks=pytest.mark.slow,
        ),
        (
            "skips",
            "rank 1 left a collective out: rank 0 waits in collective 26, all_reduce of float32[4]",
        ),
    ],
)
def test_a_rank_at_fault_is_named_with_the_stacks_of_all(
    tmp_path: Path, how: str, said: str
) -> None:
    code, _, err = Launcher("loop", tmp_path, how, module=faults.__name__).finish()
    assert code == 1 and said in err, err
    for rank in range(2):
        assert f"  rank {rank}: " in err and "faults.py" in err
        assert "in loop" in (tmp_path / "logs" / f"rank_{rank}.stacks").read_text()


@pytest.mark.parametrize("how", daily(faults.HARMLESS, 0))
def test_long_work_is_no_hang(tmp_path: Path, how: str) -> None:
    code, _, err = Launcher("loop", tmp_path, how, module=faults.__name__).finish()
    assert code == 0, err


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this process would have ended with."""
    said: list[str] = []
    monkeypatch.setattr(ending, "leave", lambda error: said.append(str(error)))
    monkeypatch.setattr(hang, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(hang, "TICK_SECONDS", 0.0)
    return said


@pytest.fixture
def heart(tmp_path: Path) -> Iterator[hang.Heart]:
    """Of rank 0 of two."""
    run: Any = types.SimpleNamespace(
        config=ResilienceConfig(), gate=Gate(), store=dist.HashStore(), rank=0, world=2
    )
    hang.calls_file(tmp_path, 0).write_text("of an earlier run")
    made = hang.Heart(run, tmp_path, Collectives(), 600.0)
    yield made
    made.close()


class Clock:
    """Time that passes as the test says, on a machine which has been up for long."""

    def __init__(self) -> None:
        self.now = 1e7

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (hang, sequence):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(hang.process, "cpu_seconds", lambda _: 1.0)
    return made


def hear(heart: hang.Heart, waits: float) -> None:
    """A beat of rank 1, from another host."""
    beat = {"number": waits, "host": "far", "pid": 1, "waits": waits, "cpu": 1.0}
    heart.store.set("beat/1", json.dumps(beat | {"at": 0, "stepping": False, "slowest": 0.0}))


def test_a_run_that_was_frozen_is_not_taken_for_one_that_hangs(
    clock: Clock, heart: hang.Heart, ended: list[str]
) -> None:
    start = heart.collectives.waits[heart.main] = clock.now

    def tick(times: int) -> None:
        for _ in range(times):
            clock.now += 2.0
            hear(heart, clock.now - start)
            heart.tick()

    tick(10)
    clock.now += 3600.0
    tick(10)
    assert not ended
    assert json.loads(heart.store.get("beat/0"))["waits"] <= 20.0
    tick(10)
    assert "every rank waits in a collective" in ended[0]


def test_a_lost_host_is_noticed_whatever_it_last_did(
    clock: Clock, heart: hang.Heart, ended: list[str]
) -> None:
    start = heart.collectives.waits[heart.main] = clock.now
    hear(heart, 0.0)
    while not ended and clock.now < start + 1000.0:
        clock.now += 2.0
        heart.tick()
    assert "the host of rank 1 is lost" in ended[0]
    assert clock.now > start + 600.0


@pytest.mark.parametrize("torn", ["", "[[", "[3]", "{}"])
def test_a_verdict_is_told_whatever_the_others_left(
    heart: hang.Heart, ended: list[str], torn: str
) -> None:
    assert not hang.calls_file(heart.logs, 0).exists()
    hang.calls_file(heart.logs, 1).write_text(torn)
    call = Call((0, 1), 1, "barrier", (), "")
    heart.collectives.calls.append((heart.main, call))
    heart._end(None, "all wait")
    assert heart.store.get("verdict").decode() == ended[0]
    assert heart._histories()[0] == [call] and "all wait" in ended[0]


def test_a_failing_watcher_is_asked_again_and_then_ends_the_run(
    ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Watcher:
        fails = True

        def tick(self) -> None:
            if self.fails:
                raise ShardwiseError("the store is gone")

        def gone(self) -> list[int]:
            return []

    watcher = Watcher()
    watching = stop.Stop(ResilienceConfig(), Gate())
    watching.watchers.append(watcher)
    monkeypatch.setattr(stop, "UNWATCHED_SECONDS", 1e9)
    watching._tick()
    monkeypatch.setattr(stop, "UNWATCHED_SECONDS", -1.0)
    watcher.fails = False
    watching._tick()
    assert not ended
    watcher.fails = True
    watching._tick()
    assert "no longer be watched" in ended[0] and "the store is gone" in ended[0]
