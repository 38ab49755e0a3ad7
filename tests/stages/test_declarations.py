"""Every stage and evaluation declares what it logs, and the metric that it is judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shardwise import checkpoint
from shardwise.config import registry
from shardwise.config.metrics import VAL_LOSS, Metric
from shardwise.config.schema import StageConfig
from shardwise.metrics import declared
from shardwise.stages.pretrain import PretrainStage
from shardwise.stages.pretrain_config import PretrainConfig
from tests.stages.recipes import TASK, recipe, run
from tests.support.pool import RankPool


@pytest.mark.parametrize(
    "kinds",
    [
        ("pretrain", "sft", "dpo", "distill"),
        ("reward", "ppo"),
        ("grpo", "online_dpo", "process_reward"),
    ],
)
def test_what_is_logged_is_declared(
    ranks: RankPool, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    config = recipe(tmp_path / "run", *kinds)
    for stage in config["stages"]:
        stage |= {"steps": 2, "checkpoint": {"every": 0}}
        if stage["kind"] == "distill":
            stage["roles"] = {"teacher": {"init_from": "sft"}}
        if stage["kind"] == "ppo":
            stage |= {"loss": {"kl_coef": 0.1}}
        if stage["kind"] == "grpo":
            stage |= {"loss": {"kl": "k3", "kl_coef": 0.1, "importance_cap": 2.0}}
    problems = {"kind": "problems", "task": TASK, "num_problems": 2, "max_new_tokens": 2}
    config["evaluations"] = [problems, problems | {"name": "again"}]
    if "pretrain" in kinds:
        config["evaluations"].append({"kind": "bits_per_byte", "seq_len": 32})
    ranks.run(run, config, world=1)
    table = declared.of(config)
    undeclared: set[tuple[str, str]] = set()
    seen: set[str] = set()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        names = {n for n, v in row.items() if isinstance(v, (int, float))} - {"time", "step"}
        seen |= names
        undeclared |= {(row["stage"], n) for n in names if n not in table[row["stage"]]}
    # How long an evaluation took, counts, and an engine's terms of whatever loss.
    ends = ("_seconds", "val_tokens", "samples")
    named = {(s, n) for s, n in undeclared if not n.endswith(ends) and not n.startswith("loss_")}
    assert not named
    assert "pretrain" not in kinds or {"accuracy", "again.accuracy"} <= seen


@pytest.mark.parametrize("kind", registry.STAGE_CONFIGS)
def test_declarations_name_what_there_is(kind: str) -> None:
    registry.discover()
    config = {
        "stages": [{"kind": kind}],
        "evaluations": [{"kind": k} for k in registry.EVALUATION_CONFIGS],
    }
    known = declared.of(config)[kind]
    unlisted = {"fp8_fallbacks"}
    for metric in known.values():
        named = {*metric.references, metric.count} - {""}
        for rule in metric.rules:
            named |= {*rule.curves.values(), rule.unless} - {""}
        assert named <= {*known, *unlisted}, metric.name
    best = registry.STAGE_CONFIGS[kind].best()
    if not issubclass(registry.STAGE_CONFIGS[kind], StageConfig):
        assert best is None, "a job has no model to choose"
        return
    assert best.better and known[best.name].better == best.better


def judged(config: dict[str, Any], metric: Metric) -> None:
    """A run whose validation rises, then falls, in both metrics."""
    values = iter([1.0, 3.0, 2.0])
    names = ("val_hits", "val_loss")
    found = mock.patch.object(
        PretrainStage, "validate", lambda self: dict.fromkeys(names, next(values))
    )
    judge = mock.patch.object(PretrainConfig, "best", classmethod(lambda cls: metric))
    with found, judge:
        run(config)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    ("metric", "step"), [(Metric("val_hits", "hits", better="higher"), 4), (VAL_LOSS, 2)]
)
def test_the_stage_says_which_checkpoint_is_best(
    ranks: RankPool, tmp_path: Path, metric: Metric, step: int, behind: bool
) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    config["stages"][0] |= {"steps": 6, "checkpoint": {"every": 2, "asynchronous": behind}}
    ranks.run(judged, config, metric, world=1)
    best = checkpoint.best(tmp_path / "run" / "stages" / "pretrain" / "checkpoints")
    assert best is not None and best.name == f"step_{step:08d}"
