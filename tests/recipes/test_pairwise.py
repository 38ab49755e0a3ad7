"""What `init` writes trains at the first try: families, formats, adapters and ranks, two by two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.recipes.api import init
from shardwise.stages.run import run_rank
from tests.models.families import FAMILIES
from tests.recipes.tiny import ROWS, data_file, model_folder, pairwise
from tests.support.pool import RankPool

CASES = list(
    pairwise(
        list(FAMILIES),
        list(ROWS),
        [None, "lora", "qlora"],
        ["jsonl", "json", "parquet"],
        [1, 2],
    )
)
DAILY = [
    ("qwen3", ("dpo", "conversational"), "lora", "jsonl", 2),
    ("mistral", ("reward", "preference"), None, "jsonl", 1),
    ("qwen2", ("grpo", "with steps"), "lora", "jsonl", 1),
]


def test_every_two_values_meet() -> None:
    factors = [["a", "b", "c"], [1, 2], [True, False], ["x", "y", "z"]]
    found = list(pairwise(*factors))
    for i in range(4):
        for j in range(i):
            assert {(c[i], c[j]) for c in found} == {(a, b) for a in factors[i] for b in factors[j]}
    assert len(found) < 14


def train(recipe: str, overrides: list[str]) -> dict[str, Any]:
    return run_rank(load_config(recipe, overrides))


def first_try(case: tuple[Any, ...], folder: Path, ranks: RankPool) -> None:
    family, (stage, form), adapter, suffix, world = case
    data = data_file(stage, form, folder, suffix=suffix)
    written = init(
        model_folder(family, folder / "model"),
        data,
        stage=stage,
        adapter=adapter,
        ranks=world,
        out=folder / "recipe.yaml",
    )
    run_dir = folder / "run"
    fewer = ["stages.0.steps=2", f"run_dir={run_dir}", "engine.compile=false"]
    fewer += ["stages.0.schedule.warmup_steps=0"]
    if stage == "grpo":
        fewer += ["stages.0.sampling.max_new_tokens=6", "evaluations.0.max_new_tokens=6"]
    ranks.run(train, str(written.path), fewer, world=world)
    summary = json.loads((run_dir / "summary.json").read_text())
    [stage_summary] = summary["stages"]
    assert stage_summary["steps"] == 2
    assert ("val_loss" in stage_summary["figures"]) == (stage != "grpo")
    measured = {"pretrain": {"val_bits_per_byte"}, "grpo": {"accuracy"}}.get(stage, set())
    assert measured <= stage_summary["metrics"].keys()


@pytest.mark.parametrize("case", DAILY, ids=lambda c: "-".join(map(str, (c[0], *c[1]))))
def test_first_try(case: tuple[Any, ...], tmp_path: Path, ranks: RankPool) -> None:
    first_try(case, tmp_path, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, (c[0], *c[1], *c[2:]))))
def test_first_try_of_all(case: tuple[Any, ...], tmp_path: Path, ranks: RankPool) -> None:
    first_try(case, tmp_path, ranks)
