"""Rounds are written out: names, references, sources, and what is wrong keeps its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.config.repeat import UntilConfig
from shardwise.errors import ConfigError

RECIPE = """\
model: {family: llama, hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 2, ffn_size: 32}
stages:
  - {kind: pretrain, steps: 1}
  - kind: repeat
    name: round
    times: 2
    until: {metric: accuracy, min_gain: 0.01}
    stages:
      - {kind: sft, name: learn, steps: 3, task: {kind: count_letters}}
      - {kind: grpo, steps: 4, batch: {global_batch: 2}}
  - {kind: sft, name: last, steps: 5, task: {kind: count_letters}}
evaluations:
  - {kind: problems, task: {kind: count_letters}, stages: [learn]}
"""


def load(tmp_path: Path, text: str = RECIPE, *overrides: str) -> Any:
    file = tmp_path / "flywheel.yaml"
    file.write_text(text)
    return load_config(file, overrides)


def test_stages_are_written_out_by_round(tmp_path: Path) -> None:
    run = load(tmp_path).config
    names = [s.name for s in run.stages]
    assert names == [
        *("pretrain", "learn-1", "grpo-1", "round-1"),
        *("learn-2", "grpo-2", "round-2", "last"),
    ]
    assert run.evaluations[0].stages == ["learn-1", "learn-2"]
    rule = run.stages[3]
    assert isinstance(rule, UntilConfig) and rule.done == 1
    assert rule.rounds == [["learn-1", "grpo-1", "round-1"], ["learn-2", "grpo-2", "round-2"]]
    assert load_config(run.model_dump(mode="json")).config == run


def test_overrides_and_sources_mean_what_was_written(tmp_path: Path) -> None:
    loaded = load(tmp_path, RECIPE, "stages.round.stages.learn.steps=7", "stages.round.times=3")
    found = [s.steps for s in loaded.config.training if s.name.startswith("learn")]
    assert found == [7, 7, 7]
    where = loaded.provenance
    assert where["stages.1.steps"].kind == "override"
    assert where["stages.2.steps"].line == 10
    assert where["stages.10.steps"].line == 11, "what stands behind has moved, with its source"


def test_names_mean_the_newest_stage_of_that_name(tmp_path: Path) -> None:
    text = RECIPE.replace("name: learn, steps: 3", "name: learn, start_from: grpo, steps: 3")
    text = text.replace("{kind: grpo, steps: 4", "{kind: grpo, start_from: learn, steps: 4")
    starts = {s.name: s.start_from for s in load(tmp_path, text).config.training}
    assert starts["learn-1"] is None and starts["learn-2"] == "grpo-1"
    assert starts["grpo-1"] == "learn-1" and starts["grpo-2"] == "learn-2"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("times: 2", "times: 0", ("flywheel.yaml:6", "stages.1.times", "at least 1")),
        ("times: 2", "tims: 2", ("flywheel.yaml:6", "did you mean 'times'")),
        ("min_gain: 0.01", "min_gain: 2", ("flywheel.yaml:7", "stages.1.until.min_gain")),
        ("name: learn, steps: 3", "name: learn, stps: 3", ("flywheel.yaml:9", "stps", "steps")),
        ("task: {kind: count_letters}}\n      -", "data: {sources: [{from: grpo.x}]}}\n      -",
         ("flywheel.yaml:9", "round 1 has nothing to read there")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_where_it_was_written(
    tmp_path: Path, old: str, new: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, RECIPE.replace(old, new, 1))
    assert all(w in str(caught.value) for w in words), str(caught.value)
