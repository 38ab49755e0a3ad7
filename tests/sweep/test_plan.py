"""Every trial is checked before any starts, and a sweep that has changed is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.sweep.config import SweepConfig
from shardwise.sweep.plan import Plan, make_plan, with_words, write_meaning
from shardwise.sweep.trial import read_trials
from tests.sweep.conftest import LR

Load = Callable[..., SweepConfig]
LAYOUT = "engine.layout"


def started(config: SweepConfig, num: int | None = None) -> Plan:
    """A plan whose first trials stand in their folders."""
    plan = make_plan(config)
    write_meaning(plan)
    for trial in plan.trials[:num]:
        trial.write()
    return plan


def test_trials_say_what_they_are_and_how_many_ranks(load: Load) -> None:
    plan = make_plan(load({LAYOUT: ["zero1", "tp2", "dp2.zero2"], "seed": [1, 2]}, repeats=1))
    assert [t.ranks for t in plan.trials] == [1, 1, 2, 2, 2, 2]
    assert [t.name for t in plan.trials] == [f"000{i}" for i in range(6)]
    assert plan.trials[3].overrides[LAYOUT] == "tp2" and plan.trials[3].overrides["seed"] == 2
    assert not plan.directory.exists()  # nothing was written


def test_all_that_cannot_run_is_told_at_once(load: Load) -> None:
    search = {LAYOUT: ["tp3", "zero1", "tp2.sp"], "stages.pretrain.batch.seq_len": [16, 512]}
    with pytest.raises(ConfigError) as error:
        make_plan(load(search))
    text = str(error.value)
    assert text.startswith("4 trials cannot run (skip_impossible: true leaves them out)")
    assert "0000, 0001: " in text and "tp3 does not divide num_heads 4" in text
    assert "0003, 0005: " in text and "512 exceeds" in text
    assert "(the sweep's engine.layout)" in text and "command line" not in text


def test_what_cannot_run_is_left_out_if_asked_for(load: Load) -> None:
    plan = make_plan(load({LAYOUT: ["tp3", "zero1"]}, skip_impossible=True))
    assert [t.name for t in plan.trials] == ["0001"]
    assert "tp3" in plan.impossible["0000"][3]
    with pytest.raises(ConfigError, match="no trial can run"):
        make_plan(load({LAYOUT: ["tp3"]}, skip_impossible=True))


@pytest.mark.parametrize(
    ("search", "rest", "said"),
    [
        ({"stages.pretrain.optimiser.lr": [1]}, {}, "did you mean 'optimizer'"),
        (None, {"objective": {"metric": "val_los"}}, "declares no 'val_los'; did you mean 'val_l"),
        (None, {"objective": {"stage": "pretran"}}, "did you mean 'pretrain'"),
        (None, {"objective": {"metric": "lr"}}, "objective.better: lr is neither"),
        (None, {"recipe": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        ({LAYOUT: ["tp2"]}, {"ranks": 3}, "needs 2 ranks but 3 were started"),
        ({"seed": [1]}, {"method": {"kind": "random", "trials": 2}}, "the search has 1 points"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    load: Load, search: Any, rest: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_plan(load(search, **rest))


def test_repeats_have_seeds_that_follow(load: Load) -> None:
    plan = make_plan(load({LR: [1e-3]}, repeats=3))
    assert [t.name for t in plan.trials] == ["0000", "0000-r1", "0000-r2"]
    assert [t.overrides.get("seed", 5) for t in plan.trials] == [5, 6, 7]


def test_a_grid_may_grow_and_its_trials_keep_their_numbers(load: Load) -> None:
    started(load({LR: [1e-3, 1e-1]}))
    plan = make_plan(load({LR: [1e-3, 1e-2, 1e-1]}, repeats=2))
    assert [(t.number, t.point[LR]) for t in plan.trials if not t.repeat] == [
        (0, 1e-3), (1, 1e-1), (2, 1e-2)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"search: the point of trial 0001 .* is not in it any"):
        make_plan(load({LR: [1e-3]}))


def test_more_random_trials_begin_alike(load: Load) -> None:
    space = {LR: {"low": 1e-4, "high": 1e-1, "scale": "log"}}
    few = started(load(space, method={"kind": "random", "trials": 2}))
    many = make_plan(load(space, method={"kind": "random", "trials": 4}))
    assert [t.point for t in many.trials[:2]] == [t.point for t in few.trials]
    with pytest.raises(ConfigError, match=r"method.trials: the point of trial 0001"):
        make_plan(load(space, method={"kind": "random", "trials": 1}))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"overrides": {"stages.pretrain.steps": 8}}, "recipe.stages.0.steps: is 8, and was 4"),
        ({"method": {"kind": "random", "trials": 2, "seed": 1}}, "method.seed: is 1, and was 0"),
        ({"search": {LR: {"low": 1e-4, "high": 1e-1}}}, f'search.{LR}.scale: is "linear"'),
    ],
)
def test_a_sweep_that_has_changed_names_the_key(
    load: Load, changed: dict[str, Any], said: str
) -> None:
    space = {LR: {"low": 1e-4, "high": 1e-1, "scale": "log"}}
    method = {"kind": "random", "trials": 2}
    started(load(space, method=method))
    same = {"slots": {"number": 2}, "budget": {"hours": 1.0}, "name": "other", "pruner": "median"}
    make_plan(load(space, method=method, **same))
    with pytest.raises(ConfigError, match=said):
        make_plan(load(changed.pop("search", space), **({"method": method} | changed)))


def test_a_folder_without_its_file_is_no_trial_and_a_damaged_one_is_named(load: Load) -> None:
    plan = started(load())
    (plan.trials[1].folder / "trial.json").unlink()
    assert [t.name for t in read_trials(plan.directory)] == ["0000", "0002"]
    assert [t.name for t in make_plan(load()).trials] == ["0000", "0002", "0003"]
    (plan.trials[0].folder / "trial.json").write_text("{")
    with pytest.raises(ValueError, match=r"0000/trial.json: is damaged"):
        make_plan(load())


def test_words_of_the_command_line_are_of_all_trials(load: Load, tmp_path: Path) -> None:
    config = with_words(load(), ["stages.pretrain.steps=7", "model.hidden_size=64"])
    assert all(t.overrides["stages.pretrain.steps"] == 7 for t in make_plan(config).trials)
    with pytest.raises(ConfigError, match="is searched"):
        with_words(load(), [f"{LR}=1"])
    with pytest.raises(ConfigError, match="not of the form"):
        with_words(load(), ["steps"])
