"""A page that goes along with a run: written anew when there is news, until the run has ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise.metrics.jsonl import write_jsonl
from shardwise.report import live
from shardwise.report.api import report
from shardwise.report.rundata import load_run
from shardwise.resilience.ending import write_ending
from shardwise.storage.lock import RunLock
from tests.report import synthetic

ROWS = synthetic.lines(steps=(40, 10, 10))


class Run:
    """A run that takes a step each time somebody waits for it, then ends."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.left, self.pages = folder, steps, []
        synthetic.write_run(folder, metrics=ROWS[:3])
        self.lock = RunLock(folder)

    def wait(self, seconds: float) -> None:
        assert seconds > 0
        page = self.folder / "report.html"
        self.pages.append((page.stat().st_mtime_ns, page.read_text()))
        done = len(self.pages)
        if done == self.left:
            (self.folder / "exit.json").write_text(json.dumps({"exit_code": 0, "reason": "done"}))
            self.lock.release()
        elif done % 2:  # every other time there is nothing new
            write_jsonl(self.folder / "metrics.jsonl", ROWS[done + 2 : done + 3])


def test_it_follows_until_the_run_has_ended(tmp_path: Path) -> None:
    run, told = Run(tmp_path / "run", 4), []
    live.follow([run.folder], told=told.append, wait=run.wait)
    assert told == [run.folder / "report.html"] and len(run.pages) == 4
    stamps = [stamp for stamp, _ in run.pages]
    assert stamps[0] < stamps[1] == stamps[2] < stamps[3]
    for _, text in run.pages:
        assert "location.reload()" in text and ">training<" in text
    assert "3 lines of metrics.jsonl" in run.pages[0][1]
    assert "4 lines of metrics.jsonl" in run.pages[1][1]
    last = report(run.folder).read_text()  # as the command ends
    assert "location.reload()" not in last and ">training<" not in last


def test_it_leaves_at_once_what_has_ended(tmp_path: Path) -> None:
    folder = synthetic.write_run(tmp_path / "run", metrics=ROWS)

    def never(seconds: float) -> None:
        raise AssertionError("nothing to wait for")

    live.follow([folder], wait=never)
    assert not (folder / "report.html").exists()


def test_a_killed_run_ends_it_though_nothing_was_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 99)

    def wait(seconds: float) -> None:
        run.lock.release()

    live.follow([run.folder], wait=wait)
    assert (run.folder / "report.html").exists()


def test_interrupted_it_leaves_a_page_that_stands_still(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 99)

    def wait(seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        live.follow([run.folder], wait=wait)
    run.lock.release()
    assert "location.reload()" not in (run.folder / "report.html").read_text()


def test_several_runs_until_the_last_has_ended(tmp_path: Path) -> None:
    over = synthetic.write_run(tmp_path / "over", metrics=ROWS)
    run = Run(tmp_path / "run", 99)
    texts = []

    def wait(seconds: float) -> None:
        texts.append((tmp_path / "comparison.html").read_text())
        if len(texts) == 2:
            run.lock.release()

    live.follow([over, run.folder], wait=wait)
    assert len(texts) == 2 and all("location.reload()" in text for text in texts)


def test_who_reports_its_own_end_is_not_training(tmp_path: Path) -> None:
    """`shardwise train` writes the page before it lets go of the folder."""
    synthetic.write_run(tmp_path)
    lock = RunLock(tmp_path)
    try:
        assert load_run(tmp_path).living
        write_ending(tmp_path, 0, "done")
        run = load_run(tmp_path)
        assert not run.living and run.exit_code == 0
    finally:
        lock.release()
