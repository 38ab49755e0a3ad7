"""A job's figures and artifacts on the page of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.report.api import report
from shardwise.report.jobs import jobs
from shardwise.report.page import lineage
from shardwise.report.rundata import load_run

JOB: dict[str, Any] = {
    "name": "clean",
    "kind": "filter",
    "artifacts": {
        "kept": {"rows": 1204, "path": "stages/clean/artifacts/kept.jsonl"},
        "<b>odd</b>": {"rows": "many"},
        "none": None,
    },
    "metrics": {"rows": 2000, "kept": 1204, "mean_score_kept": 0.97, "dropped_by_quota": 7,
                "events": []},
    "inputs": {"search.sft": "ab" * 16},
    "config_hash": "cd" * 16,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a filter and a stage that trains."""
    trained = {"name": "sft", "kind": "sft", "metrics": {"loss": 1.0}}
    (tmp_path / "summary.json").write_text(json.dumps({"name": "r", "stages": [JOB, trained]}))
    stages = "stages:\n- {kind: filter, name: clean}\n- {kind: sft, name: sft}\n"
    (tmp_path / "config.yaml").write_text(stages)
    return tmp_path


def test_figures_have_the_words_of_their_declaration(folder: Path) -> None:
    [job] = jobs(load_run(folder))
    assert (job.name, job.kind) == ("clean", "filter")
    assert job.figures == (
        ("rows read", "2,000", "rows"),
        ("rows kept", "1,204", "rows"),
        ("mean score of those kept", "0.97", ""),
        ("dropped by quota", "7", ""),
    )
    assert [(a.name, a.rows) for a in job.artifacts] == [
        ("clean.kept", "1,204"),
        ("clean.<b>odd</b>", "0"),
    ]


def test_the_lineage_names_what_was_read(folder: Path) -> None:
    clean, sft = lineage(load_run(folder))
    assert clean.hashes == (("config", "cd" * 16), ("search.sft", "ab" * 16))
    assert (clean.facts, sft.facts) == ((), (("training loss", "1"),))


def test_the_page_has_a_section_of_jobs(folder: Path) -> None:
    page = report(folder).read_text()
    assert '<h2 id="jobs">' in page and "clean.kept" in page and "dropped by quota" in page
    assert "<b>odd</b>" not in page
    (folder / "summary.json").write_text(json.dumps({"name": "r"}))
    assert '<h2 id="jobs">' not in report(folder).read_text()
