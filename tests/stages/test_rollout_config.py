"""A recipe's ``rollout`` section: who generates changes no rollout, and bad numbers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages.arithmetic import bytes_a_rank
from shardwise.stages.run import check_stage
from tests.stages.recipes import TASK, metrics, recipe, run
from tests.support.daily import daily
from tests.support.pool import RankPool

FP64 = "engine.precision=fp64"
EVALUATION = {"kind": "problems", "task": TASK, "num_problems": 5, "max_new_tokens": 3}


def rollouts(folder: Path, kind: str) -> list[dict[str, Any]]:
    files = sorted((folder / "rollouts" / kind).glob("step_*"))
    rows = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    return sorted(rows, key=lambda r: (r["step"], r["prompt_id"], r["sample_id"]))


@pytest.mark.parametrize(
    "adapter", daily([None, {"kind": "lora", "rank": 2}], 1), ids=["whole", "lora"]
)
def test_ranks_that_share_a_generator_write_the_same(
    ranks: RankPool, tmp_path: Path, adapter: dict[str, Any] | None
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, world in ((one, 1), (two, 2)):
        config = recipe(folder, "grpo", evaluations=[EVALUATION])
        config["stages"][0] |= {
            "steps": 2,
            "adapter": adapter,
            "rollout": {"tp": world, "max_slots": 3, "max_cache_tokens": 256},
        }
        ranks.run(run, config, FP64, world=world)
    a, b = rollouts(one, "grpo"), rollouts(two, "grpo")
    assert len(a) == len(b) == 2 * 16
    for x, y in zip(a, b, strict=True):
        for name in ("tokens", "text", "prompt_tokens", "reward"):
            assert x[name] == y[name]
        assert x["logprobs"] == pytest.approx(y["logprobs"], abs=1e-6)
    assert [r["policy"] for r in a[:16]] == [r["policy"] for r in b[:16]], "of whole tensors"
    theirs, ours = ([r for r in metrics(f) if r["kind"] != "train"] for f in (two, one))
    assert theirs == ours and theirs, "evaluations are of the same generator"


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_evaluations_of_any_stage_may_share_a_generator(
    ranks: RankPool, tmp_path: Path, world: int
) -> None:
    rows: list[dict[str, Any]] = []
    for number in (1, world):
        rollout = {"tp": min(number, 2), "max_slots": 2}
        texts = {"kind": "continuations", "prompts": ["the quick", "a", "docum"]}
        measured = [{**e, "rollout": rollout} for e in (EVALUATION, texts)]
        config = recipe(tmp_path / str(number), "pretrain", evaluations=measured)
        config["stages"][0] |= {"steps": 1, "batch": {"global_batch": 4, "seq_len": 16}}
        summary, *_ = ranks.run(run, config, FP64, world=number)
        rows.append({k: summary[k] for k in ("accuracy", "samples")})
    assert rows[0] == rows[1]
    assert [s["prompt"] for s in rows[0]["samples"]][-3:] == ["the quick", "a", "docum"]


@pytest.mark.slow
def test_a_student_writes_the_same(ranks: RankPool, tmp_path: Path) -> None:
    rows: list[list[dict[str, Any]]] = []
    for world in (1, 2):
        config = recipe(tmp_path / str(world), "sft", "distill")
        config["stages"][0]["steps"] = 1
        teacher = {"init_from": "sft"}
        config["stages"][1] |= {"rollout": {"tp": world}, "roles": {"teacher": teacher}}
        ranks.run(run, config, FP64, world=world)
        rows.append([r for r in metrics(tmp_path / str(world)) if r["kind"] == "train"])
    for a, b in zip(*rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["tokens"] == b["tokens"]


@pytest.mark.parametrize(
    ("section", "others", "says"),
    [
        ({"tp": 3}, {}, "stages.grpo.rollout.tp: 3: it does not divide the 4 ranks"),
        ({"tp": 4}, {"model": {"num_heads": 2}}, "stages.grpo.rollout.tp: 4: it does not divide"),
        (
            {"tp": 2},
            {"adapter": {"kind": "bottleneck", "size": 2}},
            "stages.grpo.rollout.tp: an adapter of kind bottleneck is not merged",
        ),
        ({"tp": 0}, {}, "stages.0.rollout.tp"),
        ({"max_slots": 0}, {}, "stages.0.rollout.max_slots"),
        ({"max_cache_tokens": 15}, {}, "stages.0.rollout.max_cache_tokens"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, section: dict[str, Any], others: dict[str, Any], says: str
) -> None:
    config = recipe(tmp_path / "run", "grpo")
    config["stages"][0] |= {"rollout": section, **others}
    config["model"] |= config["stages"][0].pop("model", {})
    with pytest.raises(ConfigError) as error:
        found = load_config(config).config
        check_stage(found, found.training[0], 4)
    assert says in str(error.value)


def test_the_estimate_knows_it(tmp_path: Path) -> None:
    def size(**section: int) -> int:
        config = recipe(tmp_path / "run", "grpo")
        config["model"]["vocab_size"] = 300
        config["stages"][0]["rollout"] = section
        found = load_config(config).config
        return bytes_a_rank(found, found.training[0], 4, 64)

    assert size(tp=4) < size(tp=2) < size()
