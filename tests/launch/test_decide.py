"""Which end of an attempt leads to another one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwise import checkpoint
from shardwise.launch.decide import decide
from shardwise.resilience import attempts, ending
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture


def attempt(run: Path, code: int | None, to: int = 0, reason: str = "so it was") -> int:
    """One that begins, saves up to a step if need be, and ends; what is decided."""
    attempts.begin(run, ["n1", "n2"], {"sft": "dp2"}, f"slurm.7.{len(attempts.read(run))}")
    if to:
        root = run / "stages" / "sft" / "checkpoints"
        checkpoint.save(root, to, {"w": torch.zeros(1)}, {})
    if code is not None:
        ending.write_ending(run, code, reason)
    return decide(run, 0 if code == 0 else 1).exit_code


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, 0), (85, 85), (1, 85), (137, 85), (139, 85), (2, 2), (3, 3), (4, 4), (70, 70), (130, 130)],
)
def test_a_first_end(tmp_path: Path, code: int, expected: int) -> None:
    assert attempt(tmp_path, code) == expected


def test_three_attempts_without_progress_are_the_last(tmp_path: Path) -> None:
    assert [attempt(tmp_path, 1) for _ in range(3)] == [85, 85, 1]


def test_progress_and_preemption_are_no_crash_loop(tmp_path: Path) -> None:
    turns = [(1, 0), (1, 2), (1, 0), (85, 0), (85, 0), (85, 0), (137, 0), (1, 4), (1, 0), (1, 0)]
    assert [attempt(tmp_path, *turn) for turn in turns] == [85] * len(turns)
    assert attempt(tmp_path, 137) == 137
    found = decide(tmp_path, 1)
    assert found.action == "stop" and "3 attempts in a row" in found.reason


def test_a_time_too_short_for_any_step_is_no_endless_loop(tmp_path: Path) -> None:
    assert [attempt(tmp_path, 85) for _ in range(10)] == [85] * 9 + [1]
    assert attempt(tmp_path, 85, to=2) == 85


def test_an_attempt_that_says_nothing_is_given_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was lost, or it never came to the run: the end before is not taken for its own."""
    assert attempt(tmp_path, 85) == 85
    for restart, expected in ((1, 85), (2, 85), (3, 1)):
        monkeypatch.setenv(attempts.ATTEMPT, f"slurm.7.{restart}")
        assert decide(tmp_path, 1).exit_code == expected
        assert attempts.read(tmp_path)[-1].reason == "ended with exit code 1, before it began"
    assert [a.exit_code for a in attempts.read(tmp_path)] == [85, 1, 1, 1]
    monkeypatch.setenv(attempts.ATTEMPT, "slurm.7.4")
    attempts.begin(tmp_path, ["n1"], {}, "slurm.7.4")
    assert decide(tmp_path, 137).exit_code == 137
    assert "without a word" in attempts.read(tmp_path)[-1].reason


def test_success_is_what_rank_0_says(tmp_path: Path) -> None:
    assert attempt(tmp_path, None) == 85
    assert decide(tmp_path, 0).exit_code == 85
    assert attempts.read(tmp_path)[0].exit_code == 1


def test_the_command_gives_the_verdict_as_its_exit_code(
    tmp_path: Path, shardwise: Command  # noqa: F811
) -> None:  # fmt: skip
    attempt(tmp_path, 3, reason="gradients stayed non-finite")
    code, out, _ = shardwise("launch", "decide", tmp_path, "--code", 1)
    assert (code, out) == (3, "stop: diverged: gradients stayed non-finite\n")
