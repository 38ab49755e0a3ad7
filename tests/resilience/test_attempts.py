"""attempts.jsonl: who writes what, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwise.errors import DataError
from shardwise.resilience import attempts, ending
from tests.stages.recipes import recipe, run
from tests.support.pool import RankError, RankPool


def test_a_run_notes_each_attempt(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = recipe(folder, "pretrain")
    ranks.run(run, config, world=2)
    ranks.run(run, config, world=2)
    first, second = attempts.read(folder)
    steps = config["stages"][0]["steps"]
    assert first.id != second.id and first.scheduler == "local"
    assert (first.number, first.world, first.exit_code, first.start) == (1, 2, 0, {})
    assert first.layout == {"pretrain": "dp2.zero1"} and len(first.hosts) == 1
    assert first.reached == second.start == second.reached == {"pretrain": steps}
    assert first.began <= first.ended <= second.began <= second.ended  # type: ignore[operator]
    lines = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [(line["event"], line["attempt"]) for line in lines] == [
        ("start", 1), ("end", 1), ("start", 2), ("end", 2),
    ]  # fmt: skip


def test_a_run_that_breaks_says_why(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(run, config, world=1)
    bpe = ["tokenizer.kind=bpe", "tokenizer.vocab_size=270"]
    with pytest.raises(RankError, match="another tokenizer section"):
        ranks.run(run, config, *bpe, world=1)
    last = attempts.read(tmp_path / "run")[-1]
    assert last.exit_code == 2 and "another tokenizer section" in last.reason


def test_the_last_word_on_an_attempt_counts(tmp_path: Path) -> None:
    """A rank says what it saw, then its launcher what it was."""
    attempts.begin(tmp_path, ["a", "a", "b"], {"sft": "dp3"}, "local.x")
    ending.write_ending(tmp_path, 1, "lost rank 2")
    ending.write_ending(tmp_path, 137, "rank 2 of 3 failed: killed by SIGKILL", "local.x")
    [found] = attempts.read(tmp_path)
    assert (found.exit_code, found.hosts, found.world) == (137, ("a", "b"), 3)
    assert "SIGKILL" in found.reason


def test_secrets_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    attempts.begin(tmp_path, ["a"], {}, "local.x")
    attempts.end(tmp_path, 1, "no answer with hf_abcdefghijklmnop1234")
    file = tmp_path / attempts.ATTEMPTS_FILE
    assert "abcdefghij" not in file.read_text()
    file.write_text("garbage\n" + file.read_text() + '{"event": "sta')
    attempts.begin(tmp_path, ["a"], {}, "local.y")
    assert [a.id for a in attempts.read(tmp_path)] == ["local.x", "local.y"]


def test_a_line_that_is_no_attempt_s_is_named(tmp_path: Path) -> None:
    (tmp_path / attempts.ATTEMPTS_FILE).write_text('{"event": "end", "id": "x", "time": 1}\n')
    with pytest.raises(DataError, match="it lacks exit_code, reason, steps"):
        attempts.read(tmp_path)


def test_a_rank_that_is_refused_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts.refused(2, "no job of ours: nothing is written")
    monkeypatch.setenv(attempts.RUN, str(tmp_path / "run"))
    monkeypatch.setenv(attempts.ATTEMPT, "slurm.7.0")
    for reason in ("recipe.yaml: no such file", "the same from another rank"):
        attempts.refused(2, reason)
    [found] = attempts.read(tmp_path / "run")
    assert (found.id, found.exit_code, found.began) == ("slurm.7.0", 2, None)
    assert found.reason == "recipe.yaml: no such file"
    assert not (tmp_path / "run" / "exit.json").exists()
