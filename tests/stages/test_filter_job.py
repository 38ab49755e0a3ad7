"""The job ``filter``: rows of files and jobs, held-out sets of the recipe, resume, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.rewards import CountLettersConfig, ProblemSet
from shardwise.stages.held_out import held_out_texts
from shardwise.stages.run import run_rank
from shardwise.verify.jobs import killed_behind
from tests.stages import toy_job
from tests.stages.recipes import TASK, recipe
from tests.support.pool import RankError, RankPool

Row = dict[str, Any]
QUOTA = {"kind": "quota", "per_prompt": 1}
RULES = [{"kind": "threshold", "min": 0.5}, {"kind": "duplicates"}, QUOTA]


def made_rows(number: int = 24) -> list[Row]:
    """Three answers a prompt, the last two of which are good; the better one is said twice."""
    return [
        {"prompt": f"Question {i // 4}?", "completion": f"answer {min(i % 4, 2)} to {i // 4}",
         "score": min(i % 4, 2) / 2, "tree": {"node": i}}
        for i in range(number)
    ]  # fmt: skip


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def filtering(folder: Path, rows: list[Row] | None = None, **keys: Any) -> dict[str, Any]:
    """A recipe of one filter over rows that are written for it."""
    path = write(folder.parent / "rows.jsonl", made_rows() if rows is None else rows)
    sources = keys.pop("sources", [{"path": str(path)}])
    job = {"kind": "filter", "rules": RULES, "data": {"sources": sources}, "chunk": 5, **keys}
    return recipe(folder) | {"stages": [job]}


def run(config: dict[str, Any]) -> dict[str, Any]:
    return run_rank(load_config(config))


def run_and_die(config: dict[str, Any], parts: int) -> None:
    """One rank of a run that is killed behind so many parts of its jobs."""
    with killed_behind(parts):
        run(config)


def written(folder: Path, name: str = "kept", job: str = "filter") -> list[Row]:
    file = folder / "stages" / job / "artifacts" / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def bytes_of(folder: Path) -> dict[str, bytes]:
    artifacts = folder / "stages" / "filter" / "artifacts"
    return {path.name: path.read_bytes() for path in artifacts.iterdir()}


def test_kept_rows_have_all_of_their_fields(ranks: RankPool, tmp_path: Path) -> None:
    [summary] = ranks.run(run, filtering(tmp_path / "run"), world=1)
    kept = written(tmp_path / "run")
    assert [r["completion"] for r in kept] == [f"answer 2 to {i}" for i in range(6)]
    assert all(r in made_rows() for r in kept)
    dropped = written(tmp_path / "run", "dropped")
    assert {r["dropped_by"] for r in dropped} == {"threshold", "duplicates", "quota"}
    assert len(kept) + len(dropped) == 24
    [report] = written(tmp_path / "run", "report")
    assert report["kept"] == 6 == summary["stages"][0]["metrics"]["kept"]
    assert summary["stages"][0]["metrics"]["dropped_by_threshold"] == 6


def test_same_bytes_on_any_number_of_ranks_and_after_a_kill(
    ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(run, filtering(tmp_path / "one"), world=1)
    ranks.run(run, filtering(tmp_path / "two", chunk=7), world=2)
    for calls in (0, 2, 4):
        config = filtering(tmp_path / f"killed{calls}")
        ranks.run(run_and_die, config, calls, world=2)
        ranks.run(run, config, world=1)
        assert bytes_of(tmp_path / f"killed{calls}") == bytes_of(tmp_path / "one")
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def test_a_job_is_filtered_and_learnt_from(ranks: RankPool, tmp_path: Path) -> None:
    config = filtering(tmp_path / "run", sources=[{"from": "toy.texts"}], rules=[QUOTA])
    sft = recipe(tmp_path / "run", "sft")["stages"][0]
    del sft["task"], sft["num_problems"]
    sft["data"] = {"sources": [{"from": "filter.kept"}], "pack": False}
    config["stages"] = [toy_job.toy(), *config["stages"], sft]
    [summary] = ranks.run(toy_job.run, config, world=1)
    _, job, learnt = summary["stages"]
    assert list(job["inputs"]) == ["toy.texts"]
    assert learnt["inputs"] == {"filter.kept": job["artifacts"]["kept"]["xxh3_128"]}


def held_out_question() -> str:
    task = CountLettersConfig(min_length=2, max_length=4)
    return ProblemSet(task, "held_out", 3)[2].question


def test_what_the_recipe_measures_on_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    leak = {"prompt": held_out_question().upper(), "completion": "1", "score": 1}
    evaluations = [{"kind": "problems", "num_problems": 4, "task": TASK}]
    config = filtering(tmp_path / "run", [*made_rows(), leak]) | {"evaluations": evaluations}
    with pytest.raises(
        RankError, match=r"stages.filter: 1 of 25 rows overlap .*rows.jsonl: line 25"
    ):
        ranks.run(run, config, world=2)
    assert not (tmp_path / "run" / "stages" / "filter" / "artifacts").exists()
    config["stages"][0]["contamination"] = {"on_overlap": "drop"}  # parts are made again
    [summary, _] = ranks.run(run, config, world=2)
    assert summary["stages"][0]["metrics"]["dropped_by_contamination"] == 1
    config["stages"][0] |= {"contamination": {"recipe": False}, "name": "careless"}
    config["evaluations"] = []
    [summary] = ranks.run(run, config | {"run_dir": str(tmp_path / "other")}, world=1)
    assert summary["stages"][0]["metrics"]["kept"] == 7


def test_every_part_of_a_recipe_says_what_it_holds_out(tmp_path: Path) -> None:
    chats = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(40)]
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
    problems = [{"prompt": f"{i}?", "answer": i} for i in range(20)]
    choices = [{"question": "which?", "choices": ["a", "b"], "answer": 0}]
    said = {"chats": chats, "pairs": pairs, "problems": problems, "choices": choices}
    files = {name: str(write(tmp_path / f"{name}.jsonl", rows)) for name, rows in said.items()}
    (tmp_path / "doc.txt").write_text("a held-out document")
    config = recipe(tmp_path / "run", "sft", "dpo")
    sft, dpo = config["stages"]
    sft["data"] = {"sources": [{"path": files["chats"]}], "held_out": 0.5}
    for key in ("task", "num_problems"):
        sft.pop(key, None)
    dpo["data"] = {"validation": [{"path": files["pairs"]}]}
    config["evaluations"] = [
        {"kind": "problems", "task": {"kind": "file", "path": files["problems"], "held_out": 0.5}},
        {"kind": "multiple_choice", "path": files["choices"]},
        {"kind": "bits_per_byte", "data": {"validation": [
            {"kind": "text", "path": str(tmp_path / "doc.txt")}]}},
    ]  # fmt: skip
    texts = list(held_out_texts(load_config(config).config))
    by_part: dict[str, list[Any]] = {}
    for text in texts:
        by_part.setdefault(text.where.split(":")[0], []).append(text)
    assert set(by_part) == {"sft", "dpo", "problems", "multiple_choice", "bits_per_byte"}
    assert 8 < len(by_part["sft"]) < 32 and 4 < len(by_part["problems"]) < 16
    assert [t.exact for t in by_part["dpo"]] == [True] * dpo["num_held_out"] + [False]
    assert by_part["multiple_choice"][0].answers == ("a", "b")
    assert by_part["bits_per_byte"][0].answers == ("a held-out document",)


def test_nothing_left_is_an_error_and_can_be_mended(ranks: RankPool, tmp_path: Path) -> None:
    config = filtering(tmp_path / "run", rules=[{"kind": "threshold", "min": 2.0}])
    with pytest.raises(RankError, match=r"stages.filter: no row is left of 24; .*a lower min"):
        ranks.run(run, config, world=1)
    assert not (tmp_path / "run" / "stages" / "filter" / "artifacts").exists()
    config["stages"][0]["rules"] = [{"kind": "threshold", "min": 1.0}]
    ranks.run(run, config, world=1)
    assert len(written(tmp_path / "run")) == 12


def test_rows_of_two_formats_are_refused(ranks: RankPool, tmp_path: Path) -> None:
    other = write(tmp_path / "chats.jsonl", [{"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])  # fmt: skip
    rows = write(tmp_path / "rows.jsonl", made_rows())
    sources = [{"path": str(rows)}, {"path": str(other)}]
    config = filtering(tmp_path / "run", sources=sources)
    with pytest.raises(
        RankError, match=r"sources: rows of messages and of prompt-completion; what"
    ):
        ranks.run(run, config, world=1)


def test_a_source_that_is_no_rows_is_refused_at_once(tmp_path: Path) -> None:
    config = filtering(tmp_path / "run", sources=[{"kind": "text", "path": "a.txt"}])
    with pytest.raises(ConfigError, match=r"sources.0.kind.*is text; filtered are messages"):
        load_config(config)
