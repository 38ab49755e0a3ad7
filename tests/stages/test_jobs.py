"""Jobs: artifacts feed later stages, resume is exact, what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from tests.stages import toy_job
from tests.stages.recipes import TASK, recipe
from tests.stages.toy_job import known, rows_written, run, run_and_die, toy
from tests.support.pool import RankError, RankPool


def made(folder: Path, *kinds: str, **keys: Any) -> dict[str, Any]:
    """A recipe that begins with a toy job."""
    found = recipe(folder, *kinds)
    return found | {"stages": [toy(**keys), *found["stages"]]}


def fed(folder: Path, **keys: Any) -> dict[str, Any]:
    """Fine-tuning on what the job writes."""
    config = made(folder, "sft", **keys)
    sft = config["stages"][1]
    del sft["task"], sft["num_problems"]
    sft["data"] = {"sources": [{"from": "toy.texts"}], "pack": False}
    return config


@pytest.mark.parametrize("world", [1, 2])
def test_rows_do_not_depend_on_ranks_or_on_the_chunk(
    ranks: RankPool, tmp_path: Path, world: int
) -> None:
    config = made(tmp_path / "run", chunk=3 if world == 2 else 4)
    [summary, *_] = ranks.run(run, config, world=world)
    rows = [json.loads(line) for line in rows_written(tmp_path / "run").splitlines()]
    assert rows == [{"prompt": f"{i}", "completion": f"{2 * i}"} for i in range(10)]
    [result] = summary["stages"]
    assert result["metrics"] == {"sum": 90}
    assert result["artifacts"]["texts"]["rows"] == 10
    assert not (tmp_path / "run" / "stages" / "toy" / "parts").exists()


def test_a_killed_job_goes_on_behind_its_last_part(ranks: RankPool, tmp_path: Path) -> None:
    config = made(tmp_path / "run")
    ranks.run(run_and_die, config, 1, world=1)
    parts = tmp_path / "run" / "stages" / "toy" / "parts"
    [part] = parts.iterdir()
    before = part.stat().st_mtime_ns
    ranks.run(run_and_die, config, 1, world=2)
    assert part.stat().st_mtime_ns == before, "what is done is not done again"
    assert len(list(parts.iterdir())) == 2
    ranks.run(run, config, world=2)
    ranks.run(run, made(tmp_path / "whole"), world=1)
    assert rows_written(tmp_path / "run") == rows_written(tmp_path / "whole")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["step"], x["largest"]) for x in lines if "largest" in x] == [
        (1, 6),
        (2, 14),
        (3, 18),
    ]


def test_a_damaged_part_is_made_again(ranks: RankPool, tmp_path: Path) -> None:
    config = made(tmp_path / "run")
    ranks.run(run_and_die, config, 2, world=1)
    [_, second] = sorted((tmp_path / "run" / "stages" / "toy" / "parts").iterdir())
    second.write_bytes(second.read_bytes().replace(b"8", b"9", 1))
    ranks.run(run, config, world=1)
    assert json.loads(rows_written(tmp_path / "run").splitlines()[4])["completion"] == "8"


def test_a_stage_learns_from_an_artifact_and_says_so(ranks: RankPool, tmp_path: Path) -> None:
    config = fed(tmp_path / "run")
    [summary] = ranks.run(run, config, world=1)
    job, sft = summary["stages"]
    assert sft["inputs"] == {"toy.texts": job["artifacts"]["texts"]["xxh3_128"]}
    assert sft["metrics"] == {} and sft["steps"] == 4
    [again] = ranks.run(run, config, world=1)
    assert again["stages"] == summary["stages"], "nothing is left to do"


def test_a_job_reads_what_another_has_written(ranks: RankPool, tmp_path: Path) -> None:
    config = made(tmp_path / "run")
    config["stages"].append(toy(name="next", data={"sources": [{"from": "toy.texts"}]}))
    ranks.run(run, config, world=2)
    first = json.loads(rows_written(tmp_path / "run", "next").splitlines()[0])
    assert first == {"prompt": "0", "completion": "10"}


def test_another_recipe_or_input_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_and_die, made(tmp_path / "parts"), 1, world=1)
    with pytest.raises(RankError, match="parts were made with another config"):
        ranks.run(run, made(tmp_path / "parts", factor=3), world=1)
    ranks.run(run, fed(tmp_path / "run"), world=1)
    with pytest.raises(RankError, match="artifacts were made with another config"):
        ranks.run(run, fed(tmp_path / "run", factor=3), world=1)
    (tmp_path / "run" / "stages" / "toy" / "result.json").unlink()
    with pytest.raises(RankError, match=r"stage sft: .* another artifact toy.texts"):
        ranks.run(run, fed(tmp_path / "run", factor=3), world=1)


def test_a_changed_artifact_is_noticed(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run, made(tmp_path / "run"), world=1)
    file = tmp_path / "run" / "stages" / "toy" / "artifacts" / "texts.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RankError, match="is not what stage toy wrote"):
        ranks.run(run, made(tmp_path / "run"), world=1)


@pytest.mark.parametrize("world", [1, 2])
def test_nothing_left_is_an_error_on_every_rank(
    ranks: RankPool, tmp_path: Path, world: int
) -> None:
    config = made(tmp_path / "run", factor=13)
    with pytest.raises(RankError, match="thirteen leaves nothing"):
        ranks.run(run, config, world=world)
    assert not (tmp_path / "run" / "stages" / "toy" / "artifacts").exists()


def test_an_artifact_without_rows_is_told_to_who_would_read_it(
    ranks: RankPool, tmp_path: Path
) -> None:
    words = r"DataError.*stages.sft.data.sources.0.from: toy.texts has no rows"
    with pytest.raises(RankError, match=words):
        ranks.run(run, fed(tmp_path / "run", factor=12), world=2)
    assert rows_written(tmp_path / "run") == b"", "what was made is kept"


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("toy.pairs", "is nothing that an earlier stage writes; these are: toy.texts"),
        ("sft.texts", "is nothing that an earlier stage writes"),
        ("toy", "allowed"),
    ],
)
def test_a_wrong_reference_names_its_key(tmp_path: Path, reference: str, words: str) -> None:
    config = fed(tmp_path / "run")
    config["stages"][1]["data"]["sources"] = [{"from": reference}]
    with known(), pytest.raises(ConfigError, match=words) as caught:
        load_config(config)
    assert "stages.1.data.sources.0.from" in str(caught.value)


def test_a_path_and_a_reference_are_one_too_many(tmp_path: Path) -> None:
    config = fed(tmp_path / "run")
    config["stages"][1]["data"]["sources"] = [{"from": "toy.texts", "path": "x.jsonl"}]
    with known(), pytest.raises(ConfigError, match="keep one"):
        load_config(config)


def test_a_reference_survives_the_resolved_recipe(tmp_path: Path) -> None:
    from shardwise.config.export import resolved_yaml

    with known():
        run = load_config(fed(tmp_path / "run")).config
        assert "from: toy.texts" in resolved_yaml(run)
        assert load_config(run.model_dump(mode="json")).config == run


def test_a_job_starts_from_a_checkpoint_of_another_run(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run, recipe(tmp_path / "first", "pretrain"), world=1)
    start = str(tmp_path / "first" / "stages" / "pretrain" / "checkpoints")
    search = {
        "kind": "search",
        "task": TASK,
        "num_problems": 2,
        "method": {"kind": "best_of_n", "samples": 2, "choose": "majority"},
        "sampling": {"max_new_tokens": 4},
    }
    config = recipe(tmp_path / "run", "sft") | {"stages": [search], "init_from": start}
    [summary] = ranks.run(run, config, world=1)
    [result] = summary["stages"]
    assert result["artifacts"]["trees"]["rows"] == 2 and result["parent_hash"]


def test_toys_are_known_to_their_tests_alone() -> None:
    from shardwise.config.registry import STAGE_CONFIGS

    assert "toy" not in STAGE_CONFIGS
    assert toy_job.ToyConfig.outputs == {"texts": "prompt-completion"}
