"""Callbacks: the loop's hooks in order, those of a recipe, and what may stop a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest

from shardwise.config import registry as configs
from shardwise.config.callbacks import CallbackConfig
from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages import callbacks, registry
from shardwise.stages.loop import Loop
from tests.stages.recipes import metrics, recipe, run
from tests.support.pool import RankError, RankPool


class DiaryConfig(CallbackConfig):
    kind: Literal["diary"]


class Diary(callbacks.Callback):
    def __init__(self, config: DiaryConfig) -> None:
        self.lines: list[str] = []

    def start(self, loop: Loop, done: int) -> None:
        self.lines.append(f"start {done}")

    def before_step(self, loop: Loop, step: int) -> None:
        self.lines.append(f"before {step}")

    def after_step(self, loop: Loop, done: int, metrics: dict[str, float]) -> None:
        self.lines.append(f"after {done}")
        metrics["own"] = 2.0 * done

    def after_validation(self, loop: Loop, done: int, found: Any, metrics: Any) -> None:
        self.lines.append(f"validated {done} {'val_loss' in found}")

    def after_checkpoint(self, loop: Loop, done: int) -> None:
        self.lines.append(f"saved {done}")

    def error(self, loop: Loop, error: BaseException) -> None:
        self.lines.append(type(error).__name__)

    def end(self, loop: Loop) -> None:
        self.lines.append("end")


def diary(config: dict[str, Any], *overrides: str) -> list[list[str]]:
    """One rank of a run with a diary; the lines of each stage's."""
    made: list[Diary] = []

    def build(config: DiaryConfig) -> Diary:
        made.append(Diary(config))
        return made[-1]

    with (
        mock.patch.dict(configs.CALLBACK_CONFIGS, {"diary": DiaryConfig}),
        mock.patch.dict(registry._CALLBACKS, {"diary": build}),
    ):
        try:
            run(config, *overrides)
        except Exception as error:
            if "forbids" not in str(error):
                raise
    return [d.lines for d in made]


def test_hooks_come_in_order_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain", callbacks=[{"kind": "diary"}])
    first, second = ranks.run(diary, config, world=2)
    assert first == second == [[
        "start 0", "before 0", "after 1", "before 1", "after 2", "validated 2 True", "saved 2",
        "before 2", "after 3", "before 3", "after 4", "validated 4 True", "saved 4", "end",
    ]]  # fmt: skip


def test_a_resumed_run_calls_them_for_its_own_steps(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain", callbacks=[{"kind": "diary"}])
    ranks.run(diary, config, "stages.0.steps=2", world=1)
    [[lines]] = ranks.run(diary, config, world=1)
    assert lines[0] == "start 2" and lines[-1] == "end"
    assert [x for x in lines if x.startswith("before")] == ["before 2", "before 3"]


def test_they_go_with_the_stages_that_are_named(ranks: RankPool, tmp_path: Path) -> None:
    named = [{"kind": "diary", "stages": ["sft"]}]
    config = recipe(tmp_path / "run", "pretrain", "sft", callbacks=named)
    [[lines]] = ranks.run(diary, config, world=1)
    assert lines[0] == "start 0"


@pytest.mark.parametrize("world", [1, 2])
def test_a_metric_out_of_bounds_ends_the_run(ranks: RankPool, tmp_path: Path, world: int) -> None:
    stop = {"kind": "stop_when", "metric": "loss", "above": 0.5, "patience": 3}
    config = recipe(tmp_path / "run", "pretrain", callbacks=[stop])
    with pytest.raises(RankError, match=r"loss is .* at step 3, above 0.5, 3 times in a row"):
        ranks.run(run, config, world=world)
    assert max(line["step"] for line in metrics(tmp_path / "run")) == 3
    said = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert said["exit_code"] == 3
    again = config | {"callbacks": []}
    [summary, *_] = ranks.run(run, again, world=world)
    assert summary["stages"][0]["steps"] == 4, "the same command goes on from the newest"


def test_who_listens_hears_of_the_end(ranks: RankPool, tmp_path: Path) -> None:
    stop = {"kind": "stop_when", "metric": "val_loss", "below": 100.0}
    config = recipe(tmp_path / "run", "pretrain", callbacks=[{"kind": "diary"}, stop])
    [[lines]] = ranks.run(diary, config, world=1)
    assert lines[-1] == "DivergedError"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"kind": "stop_when", "metric": "loss"}, "give above, below"),
        ({"kind": "stop_wen", "metric": "loss"}, "did you mean 'stop_when'"),
        ({"kind": "stop_when", "metric": "x", "above": 1.0, "stages": ["a"]}, "names the stages a"),
    ],
)
def test_bad_callbacks_are_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(recipe(tmp_path / "run", "pretrain", callbacks=[said]))
