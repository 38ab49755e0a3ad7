"""SIGKILL in every phase of a save, and at random times (fault rows 1 and 2).

Every victim is a real process; its death is its own SIGKILL inside of a phase of the writer, or
its parent's at a random time. The oracle: the newest committed step loads, bit for bit, and the
next save works.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from shardwise import checkpoint
from shardwise.checkpoint import steps
from tests.checkpoint.tools import newest, save
from tests.checkpoint.victims import endless, ranked, victim
from tests.support.pool import CONTEXT

# (method of the writer, which call of it, after it is done, step that must load afterwards)
MOMENTS = [
    ("stage", 0, False, 2),
    ("stage", 0, True, 2),
    ("shard", 0, False, 2),
    ("write", 1, False, 2),  # in the middle of the first file
    ("sync", 0, False, 2),
    ("shard", 0, True, 2),
    ("shard", 1, False, 2),
    ("shard", 1, True, 2),
    ("extras", 0, False, 2),
    ("extras", 0, True, 2),
    ("manifest", 0, False, 2),
    ("manifest", 0, True, 2),
    ("rename", 0, False, 2),
    ("rename", 0, True, 3),
    ("pointer", 0, False, 3),
    ("pointer", 0, True, 3),  # the best
    ("pointer", 1, True, 3),  # the latest
    ("prune", 0, False, 3),
    ("remove_tree", 0, False, 3),  # a pruned directory has lost its name, its files are there
    ("prune", 0, True, 3),
]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("phase", "number", "after", "expected"), MOMENTS)
def test_killed_in_a_phase(
    tmp_path: Path, phase: str, number: int, after: bool, expected: int, asynchronous: bool
) -> None:
    save(tmp_path, 1, metric=2.0)
    save(tmp_path, 2, metric=1.0)
    process = CONTEXT.Process(target=victim, args=(tmp_path, phase, number, after, asynchronous))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    pointer = steps.read_pointer(tmp_path, steps.LATEST)
    assert pointer is not None and pointer["step"] <= expected  # never ahead of durable data
    assert newest(tmp_path) == expected
    if expected == 2:
        assert {1, 2} <= set(checkpoint.list_steps(tmp_path))  # nothing was pruned first
    save(tmp_path, 4, keep=1, metric=0.5)
    assert newest(tmp_path) == 4
    best = checkpoint.best(tmp_path)
    assert best is not None and checkpoint.verify(best) == []
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"best.json", "latest.json", "step_00000004", best.name} | (
        {"step_00000003"} & left if expected == 3 else set()
    )


def kill_at_random(root: Path, seed: int) -> None:
    rng = random.Random(seed)
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=endless, args=(root, theirs, seed % 2 == 1))
    process.start()
    theirs.close()
    durable = 0
    for _ in range(rng.randint(1, 4)):
        durable = ours.recv()
    pause = rng.uniform(0, 0.03)  # anywhere in the saves that follow
    while ours.poll(pause):
        durable = ours.recv()
        pause = rng.choice([0.0, pause / 2])
        if pause == 0.0:
            break
    process.kill()
    process.join()
    while True:
        try:
            durable = ours.recv()
        except EOFError:
            break
    steps_left = checkpoint.list_steps(root)
    assert (newest(root) if steps_left else 0) >= durable
    for step in steps_left:
        assert checkpoint.verify(root / steps.directory_name(step)) == []


@pytest.mark.parametrize("seed", range(15))
def test_killed_at_a_random_time(tmp_path: Path, seed: int) -> None:
    kill_at_random(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_killed_at_a_hundred_random_times(tmp_path: Path, seed: int) -> None:
    kill_at_random(tmp_path, seed)


@pytest.mark.parametrize(
    ("phase", "dies", "asynchronous", "expected"),
    [
        ("shard", 1, False, 2),
        ("shard", 1, True, 2),
        ("shard", 0, False, 2),
        ("manifest", 0, True, 2),
        ("pointer", 0, False, 3),
    ],
)
def test_a_rank_is_killed(
    tmp_path: Path, phase: str, dies: int, asynchronous: bool, expected: int
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 2)
    pipes = [CONTEXT.Pipe() for _ in range(2)]
    processes = [
        CONTEXT.Process(
            target=ranked,
            args=(rank, str(tmp_path / "store"), root, phase, dies, asynchronous, pipes[rank][1]),
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert processes[dies].exitcode == -signal.SIGKILL
    assert pipes[1 - dies][0].poll(), "the survivor must be told"
    assert "lost contact" in pipes[1 - dies][0].recv()
    assert newest(root) == expected
    if dies != 0:  # rank 0 lived to remove the partial directory
        assert {p.name for p in root.iterdir()} == {"latest.json", "step_00000002"}
