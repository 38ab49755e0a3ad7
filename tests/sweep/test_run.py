"""Trials in slots, with fakes in place of training: nothing is lost and nothing is run twice."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise.errors import ConfigError, ExitCode, Stopped
from shardwise.storage.lock import LockedError
from shardwise.sweep.api import planned, sweep, table_text, tables
from shardwise.sweep.plan import make_plan
from shardwise.sweep.run import NothingDone
from tests.sweep.conftest import CORES, LR, Write, in_a_fork, starts, until

Fakes = Callable[..., None]


def ends(folder: Path) -> Counter[tuple[str, int]]:
    return Counter((r["name"], r["code"]) for r in starts(folder) if r["event"] == "end")


def test_a_sweep_runs_each_trial_once(write: Write, fakes: Fakes, tmp_path: Path) -> None:
    found = sweep(write(), ["stages.pretrain.steps=4"])
    assert found["trials"] == {"done": 3}
    assert found["best"]["point"] == {LR: 1e-2} and found["best"]["value"] == 0.25
    assert [row["point"][LR] for row in found["rows"]] == [1e-2, 1e-3, 1e-1]
    assert "0001  0.25  lr 0.01" in table_text(found)
    again = sweep(write(), ["stages.pretrain.steps=4"])
    assert again["rows"] == found["rows"]
    assert ends(tmp_path / "sweep") == {(f"000{i}", 0): 1 for i in range(3)}
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert 'http-equiv="refresh"' not in page and "val_loss" in page


def test_failed_trials_keep_their_root_cause(write: Write, fakes: Fakes, tmp_path: Path) -> None:
    found = sweep(write({LR: [1e-2, 0.5, 0.7]}))
    reasons = {t["name"]: t["reason"] for row in found["rows"] for t in row["trials"]}
    assert found["trials"] == {"done": 1, "failed": 2}
    assert reasons["0001"] == "no last words but these"
    assert reasons["0002"] == "gradients stayed non-finite"
    assert "no last words but these" in (tmp_path / "sweep" / "table.md").read_text()
    sweep(write({LR: [1e-2, 0.5, 0.7]}))  # they are not tried again
    begun = Counter(r["name"] for r in starts(tmp_path / "sweep") if r["event"] == "start")
    assert begun == {"0000": 1, "0001": 1, "0002": 1}
    sweep(write({LR: [1e-2, 0.5, 0.7]}), retry_failed=True)
    begun = Counter(r["name"] for r in starts(tmp_path / "sweep") if r["event"] == "start")
    assert begun == {"0000": 1, "0001": 2, "0002": 2}


def test_when_nothing_works_the_sweep_has_failed(write: Write, fakes: Fakes) -> None:
    with pytest.raises(NothingDone, match=r"table.md has the reasons"):
        sweep(write({LR: [0.5]}))


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_slots_have_cores_of_their_own(write: Write, fakes: Fakes, tmp_path: Path) -> None:
    fakes(steps=3, seconds=0.1)
    sweep(write({LR: [1e-3, 2e-3, 3e-3, 4e-3]}), number=2)
    notes = starts(tmp_path / "sweep")
    seen = {tuple(record["cores"]) for record in notes}
    half = len(CORES) // 2
    assert seen == {tuple(CORES[:half]), tuple(CORES[half : 2 * half])}
    running: dict[str, list[int]] = {}
    most = 0
    for record in notes:
        if record["event"] == "start":
            assert record["cores"] not in running.values()
            running[record["name"]] = record["cores"]
        else:
            del running[record["name"]]
        most = max(most, len(running))
    assert most == 2


def test_more_slots_than_cores_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=f"this process may use {len(CORES)} core"):
        sweep(write(slots={"number": 2 * len(CORES)}))


def test_a_second_sweep_in_the_folder_is_refused(
    write: Write, fakes: Fakes, tmp_path: Path
) -> None:
    fakes(steps=200, seconds=0.05)
    pid = in_a_fork(write())
    try:
        until(lambda: len(starts(tmp_path / "sweep")) > 0)
        with pytest.raises(LockedError, match="another sweep lives in this folder"):
            sweep(write())
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def alive(folder: Path) -> bool:
    """Whether a fake still logs."""

    def sizes() -> list[int]:
        return [p.stat().st_size for p in folder.glob("trials/*/metrics.jsonl")]

    before = sizes()
    time.sleep(0.2)
    return sizes() != before


@pytest.mark.parametrize("after", [1, 9, 14])
def test_a_killed_sweep_goes_on(write: Write, fakes: Fakes, tmp_path: Path, after: int) -> None:
    """Killed after so many logged steps of three trials of six."""
    fakes(steps=6, seconds=0.03)
    folder = tmp_path / "sweep"
    pid = in_a_fork(write())
    until(
        lambda: (
            sum(len(p.read_text().splitlines()) for p in folder.glob("trials/*/metrics.jsonl"))
            >= after
        )
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not alive(folder)  # trials do not outlive their sweep
    finished = {name for name, code in ends(folder) if code == 0}
    found = sweep(write())
    assert found["trials"] == {"done": 3}
    assert ends(folder) == {(f"000{i}", 0): 1 for i in range(3)}
    began = Counter(r["name"] for r in starts(folder) if r["event"] == "start")
    assert all(began[name] == 1 for name in finished) and max(began.values()) <= 2
    for path in folder.glob("trials/*/metrics.jsonl"):  # on from where it was
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [
            *range(1, 7)
        ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_lets_its_trials_save(
    write: Write, fakes: Fakes, tmp_path: Path, number: signal.Signals
) -> None:
    fakes(steps=1000, seconds=0.05)  # more than it has time for
    folder = tmp_path / "sweep"
    pid = in_a_fork(write())
    until(lambda: len(starts(folder)) > 0)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ExitCode.REQUEUE
    assert ends(folder) == {("0000", 85): 1}
    fakes(steps=1000)
    assert sweep(write())["trials"] == {"done": 3}


def test_a_hopeless_trial_is_stopped_and_does_not_come_back(
    write: Write, fakes: Fakes, tmp_path: Path
) -> None:
    search = {LR: [1e-2, 2e-2, 3e-2, 1.0, 4e-2]}
    fakes(steps=30, seconds=0.02)
    pruner = {"kind": "median", "min_steps": 3, "min_trials": 3}
    found = sweep(write(search, pruner=pruner))
    states = {t["name"]: (t["state"], t["step"]) for row in found["rows"] for t in row["trials"]}
    assert states["0003"][0] == "pruned" and 3 <= states["0003"][1] < 30
    assert [s for name, (s, _) in states.items() if name < "0003"] == ["done"] * 3
    assert found["rows"][-1]["point"] == {LR: 1.0}
    assert ends(tmp_path / "sweep")["0003", 85] == 1
    again = sweep(write(search, pruner=pruner))
    assert again["rows"] == found["rows"]


def test_repeats_come_after_every_point_and_give_an_interval(
    write: Write, fakes: Fakes, tmp_path: Path
) -> None:
    found = sweep(write({LR: [1e-2, 1e-3]}, repeats=3))
    names = [r["name"] for r in starts(tmp_path / "sweep") if r["event"] == "start"]
    assert names == ["0000", "0001", "0000-r1", "0001-r1", "0000-r2", "0001-r2"]
    assert found["best"]["runs"] == 3 and found["best"]["half_interval"] == 0.0


@pytest.mark.parametrize(
    ("budget", "num"), [({"trials": 2}, 2), ({"failures": 1}, 1), ({"hours": 1e-9}, 1)]
)
def test_a_spent_budget_starts_nothing_more(
    write: Write, fakes: Fakes, tmp_path: Path, budget: dict[str, float], num: int
) -> None:
    first = 0.7 if "failures" in budget else 1e-2
    try:
        sweep(write({LR: [first, 2e-2, 3e-2]}, budget=budget))
    except NothingDone:
        assert num < 2
    begun = [r for r in starts(tmp_path / "sweep") if r["event"] == "start"]
    assert len(begun) == num
    if num == 2:  # a greater one goes on
        assert sweep(write({LR: [first, 2e-2, 3e-2]}))["trials"] == {"done": 3}


def test_a_look_at_a_sweep_starts_nothing(write: Write, fakes: Fakes, tmp_path: Path) -> None:
    found = planned(write())
    assert [t["name"] for t in found["trials"]] == ["0000", "0001", "0002"]
    assert not (tmp_path / "sweep").exists()
    sweep(write(budget={"trials": 1}))
    assert [t["state"] for t in planned(write())["trials"]] == ["done", "open", "open"]
    (tmp_path / "sweep" / "table.md").unlink()
    assert tables(write())["trials"] == {"done": 1, "waiting": 2}
    assert (tmp_path / "sweep" / "table.md").exists()
    assert len(starts(tmp_path / "sweep")) == 2


def test_a_trial_that_somebody_else_stops_is_left_open(
    write: Write, fakes: Fakes, tmp_path: Path
) -> None:
    fakes(steps=100, seconds=0.02)

    def interfere() -> None:
        until(lambda: (tmp_path / "sweep/trials/0000/metrics.jsonl").exists())
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = status.read_bytes().split(b"\0")
            except OSError:
                continue
            if str(tmp_path / "sweep/trials/0000").encode() in words:
                os.kill(int(status.parent.name), signal.SIGUSR1)

    thread = threading.Thread(target=interfere)
    thread.start()
    with pytest.raises(Stopped, match="trials 0000 were stopped by somebody else"):
        sweep(write({LR: [1e-2]}))
    thread.join()
    assert make_plan_state(write({LR: [1e-2]})) == ["open"]


def make_plan_state(path: Path) -> list[str]:
    from shardwise.sweep.config import load_sweep

    return [trial.status()[0] for trial in make_plan(load_sweep(path)).trials]


def test_an_objective_that_is_not_logged_ends_the_sweep_at_once(
    write: Write, fakes: Fakes, tmp_path: Path
) -> None:
    path = write(objective={"metric": "loss"})
    with pytest.raises(NothingDone, match=r"trial 0000 is done.* logged no loss, but val_loss"):
        sweep(path)
    assert len(ends(tmp_path / "sweep")) == 1
    assert sweep(write())["trials"] == {"done": 3}
