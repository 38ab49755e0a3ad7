"""A run that stands still names the rank at fault; one that works or waits is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.test_local import Launcher
from tests.resilience import faults


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("stopped", "rank 1 is stopped (SIGSTOP"),
        ("asleep", "rank 1 holds the interpreter (the GIL) and sleeps"),
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


@pytest.mark.parametrize("how", faults.HARMLESS)
def test_long_work_is_no_hang(tmp_path: Path, how: str) -> None:
    code, _, err = Launcher("loop", tmp_path, how, module=faults.__name__).finish()
    assert code == 0, err
