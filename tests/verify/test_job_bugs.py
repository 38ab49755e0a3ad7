"""Verify of jobs verified: every planted bug is caught, and named; without it nothing is."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import shardwise
from shardwise.verify import jobs
from shardwise.verify.verdict import Verdict
from tests.support.pool import RankPool
from tests.verify import job_bugs
from tests.verify.edits import Edit, applied, run_edited
from tests.verify.job_bugs import JOB_BUGS
from tests.verify.test_jobs import recipe

DAILY = {bug.kind: name for name, bug in reversed(JOB_BUGS.items())}.values()


class EditedPool(RankPool):
    """The ranks of another pool, of which those that are judged run an edit."""

    def __init__(self, ranks: RankPool, edit: Edit) -> None:
        self.ranks, self.edit = ranks, edit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ranks, name)

    def run(self, fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if fn in (jobs.run_in_two, jobs.run_whole):
            fn, args = run_edited, ([self.edit], fn, *args)
        return self.ranks.run(fn, *args, **options)


def verdicts(
    job: dict[str, Any], layouts: Sequence[str], pool: RankPool, folder: Path
) -> list[Verdict]:
    job = copy.deepcopy(job)
    if job["kind"] == "filter":
        write_rows(job, folder)
    scorer = [job_bugs.SCORER] if "model" in job.get("scorer", ()) else []
    report = shardwise.verify(recipe(*scorer, job), layouts, stage=job["kind"], pool=pool)
    return list(report.verdicts)


def write_rows(job: dict[str, Any], folder: Path) -> None:
    """Rows that the rules of a filter have something to say of, whatever rank judges them."""
    file, exam = folder / "rows.jsonl", folder / "exam.jsonl"
    texts = ["15", "so 15", "12 and 3 is 15"]
    rows = [{"prompt": f"what is {i // 3}", "completion": texts[i % 3]} for i in range(12)]
    rows = rows[:6] + rows  # in a part of 8, on the same of two ranks
    held = [{"prompt": "what is 3", "completion": "15"}]
    for path, some in ((file, rows), (exam, held)):
        path.write_text("".join(json.dumps(row) + "\n" for row in some))
    sources = [{"kind": "prompt-completion", "path": str(exam)}]
    job["data"] = {"sources": [{"path": str(file)}]}
    job["contamination"] = {"on_overlap": "drop", "recipe": False, "sources": sources}
    job["rules"] = [{"kind": "duplicates"}, {"kind": "length", "unit": "tokens", "max": 12}]


@pytest.mark.parametrize("name", JOB_BUGS)
def test_every_edit_fits_the_source_and_lives(name: str) -> None:
    with applied([JOB_BUGS[name].edit]) as changed:
        assert changed


def test_there_are_enough() -> None:
    assert len(JOB_BUGS) >= 12
    assert {bug.job["kind"] for bug in JOB_BUGS.values()} == {"search", "label_steps", "filter"}


@pytest.mark.parametrize("name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow)
                                  for n in JOB_BUGS])  # fmt: skip
def test_a_planted_bug_is_caught_and_named(name: str, ranks: RankPool, tmp_path: Path) -> None:
    bug = JOB_BUGS[name]
    [verdict] = verdicts(bug.job, [bug.layout], EditedPool(ranks, bug.edit), tmp_path)
    sentence = verdict.sentence()
    assert not verdict.passed and verdict.first is not None, sentence
    assert verdict.stage == bug.job["kind"]
    assert re.fullmatch(bug.named, verdict.first.kind), sentence
    assert re.match(bug.suspect, verdict.suspect), sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    "job", ["MCTS", "BEAM", "DVTS", "SCORED", "BEST", "SHARED", "LABELS", "FILTER"]
)
def test_without_a_bug_nothing_is_flagged(job: str, ranks: RankPool, tmp_path: Path) -> None:
    layouts = ["dp2", "dp4", "tp2"] + ["dp1"] * (job != "SHARED")
    found = verdicts(getattr(job_bugs, job), layouts, ranks, tmp_path)
    assert [v.layout for v in found] == layouts
    for verdict in found:
        assert verdict.passed, f"{verdict.layout}: {verdict.sentence()}"
        assert sum(verdict.counts.values()) > 50
