"""Timing in turns, and what is known of everyone else."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.metrics.timing import LOOK_SECONDS, Laps, Neighbours, busy_seconds, wait_for_quiet


def neighbours(*busy: float | None) -> Neighbours:
    """After one turn of 2 s, of two ranks that burnt 1.4 s each."""
    readings = iter(busy)
    found = Neighbours(lambda: next(readings))
    found.begin()
    found.end(2.0, 2.8)
    return found


def test_a_busy_machine_is_rejected() -> None:
    quiet, busy, unknown = neighbours(10.0, 12.9), neighbours(10.0, 13.2), neighbours(None, None)
    assert (quiet.cores, quiet.quiet) == (pytest.approx(0.05), True)
    assert (busy.cores, busy.quiet) == (pytest.approx(0.2), False)
    assert not unknown.quiet


def test_busy_seconds_reads_proc_stat(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 500 6 7 8 9 9\ncpu0 1 1 1 1\n")
    ticks = os.sysconf("SC_CLK_TCK")
    assert busy_seconds(stat) == (100 + 20 + 30 + 6 + 7 + 8) / ticks
    assert busy_seconds(tmp_path / "absent") is None


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.floats(0.1, 10))
def test_a_disturbance_of_whole_turns_changes_no_ratio(turns: list[float], factor: float) -> None:
    laps = Laps()
    for seconds in turns:
        laps.add("ours", seconds)
        laps.add("peer", seconds * factor)
    assert laps.ratio("ours", "peer") == pytest.approx(factor)


def burning(*cores: float) -> Iterator[float]:
    """Readings around looks at a machine that burns so many cores at each."""
    now = 0.0
    for rate in cores:
        yield now
        now += rate * LOOK_SECONDS
        yield now


@pytest.mark.parametrize(
    ("cores", "wait_s", "found", "looks"),
    [((0.05,), 60.0, 0.05, 1), ((2.0, 1.0, 0.08), 60.0, 0.08, 3), ((2.0, 1.5, 9.0), 4.0, 1.5, 2)],
)
def test_a_busy_machine_is_waited_for_but_not_for_ever(
    cores: tuple[float, ...], wait_s: float, found: float, looks: int
) -> None:
    readings, slept = burning(*cores), list[float]()
    seen = wait_for_quiet(0.1, wait_s, lambda: next(readings), slept.append)
    assert seen == pytest.approx(found) and len(slept) == looks


def test_a_machine_that_does_not_say_is_not_waited_for() -> None:
    assert math.isnan(wait_for_quiet(0.1, 60.0, lambda: None, lambda seconds: None))
