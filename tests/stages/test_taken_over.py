"""A stage that goes on from another run's optimizer and step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight
from shardwise.verify.pool import RankError
from tests.stages.recipes import TIMES, metrics, recipe, run, weights
from tests.support.pool import RankPool


def of(folder: Path, start: Path | None = None, **top: Any) -> dict[str, Any]:
    """Six steps of which each second is saved; with dropout, and rates that change."""
    config = recipe(folder, "pretrain", **top)
    config["model"]["dropout"] = 0.1
    schedule = {"kind": "cosine", "warmup_steps": 2}
    config["stages"][0] |= {"steps": 6, "checkpoint": {"every": 2, "keep": 9}, "schedule": schedule}
    return config if start is None else config | {"init_from": str(start), "init_optimizer": True}


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [r for r in metrics(folder) if r["kind"] == "train"]
    return [{k: v for k, v in r.items() if not any(t in k for t in TIMES)} for r in rows]


def reached(folder: Path, step: int) -> Path:
    return folder / "stages" / "pretrain" / "checkpoints" / f"step_{step:08d}"


@pytest.fixture(scope="module")
def whole(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("whole") / "run"
    ranks.run(run, of(folder), world=2)
    return folder


def test_it_is_one_run(ranks: RankPool, whole: Path) -> None:
    """Bit by bit the run that was never moved: rows, dropout, rates, moments and their age."""
    moved = whole.parent / "moved"
    ranks.run(run, of(moved, reached(whole, 4)), world=2)
    assert logged(moved) == logged(whole)[4:] and [r["step"] for r in logged(moved)] == [5, 6]
    one, two = weights(whole, "pretrain"), weights(moved, "pretrain")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_another_optimizer_is_refused(ranks: RankPool, whole: Path) -> None:
    config = of(whole.parent / "lion", reached(whole, 2))
    config["stages"][0]["optimizer"] = {"kind": "muon"}
    with pytest.raises(RankError, match=r"MismatchError: init_optimizer: stages\.pretrain\.opt"):
        ranks.run(run, config, world=2)


def refused(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        loaded = load_config(config)
        preflight(loaded.config, 1, loaded.provenance)
    return str(error.value)


def test_what_cannot_be_is_told_before_anything_starts(whole: Path) -> None:
    folder = whole.parent / "none"
    assert "there is none" in refused(of(folder) | {"init_optimizer": True})
    short = of(folder, reached(whole, 6))
    assert "has done 6 steps, and stages.pretrain.steps is 6" in refused(short)
    adapted = of(folder, reached(whole, 2))
    adapted["stages"][0]["adapter"] = {"kind": "lora"}
    assert "must train a whole model" in refused(adapted)
    dpo = recipe(folder, "dpo", init_from=str(reached(whole, 2)), init_optimizer=True)
    assert "no other role" in refused(dpo)


def test_a_start_without_an_optimizer(whole: Path, tmp_path: Path) -> None:
    from shardwise.checkpoint.convert import convert

    convert(reached(whole, 2), tmp_path / "hf", "hf")
    said = refused(of(tmp_path / "run", tmp_path / "hf"))
    assert "holds no optimizer's state" in said and "--to native" in said
