"""Optuna is told of every trial from the folders, and says the same again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import ConfigError
from shardwise.sweep.api import sweep
from shardwise.sweep.asking import Told, ask
from shardwise.sweep.config import SweepConfig, identity
from tests.sweep.conftest import LR, Write, starts

pytest.importorskip("optuna")
Load = Callable[..., SweepConfig]
SEARCH = {
    LR: {"low": 1e-4, "high": 1.0, "scale": "log"},
    "engine.layout": ["zero1", "zero2"],
    "stages.pretrain.batch.global_batch": {"low": 2, "high": 12, "step": 2},
    "model.layer": {"values": [[1, 2], {"a": 1}], "when": {"engine.layout": ["zero2"]}},
}


def method(trials: int = 6, **rest: Any) -> dict[str, Any]:
    return {"kind": "optuna", "trials": trials, "seed": 3, "startup_trials": 2, **rest}


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_an_answer_is_a_function_of_seed_number_and_history(load: Load, sampler: str) -> None:
    config = load(SEARCH, method=method(sampler=sampler))
    told: list[Told] = []
    for number in range(6):
        point = ask(config, told, "lower")
        assert point is not None and point == ask(config, told, "lower")
        assert 1e-4 <= point[LR] <= 1.0 and point["engine.layout"] in ("zero1", "zero2")
        assert point["stages.pretrain.batch.global_batch"] in range(2, 13, 2)
        assert ("model.layer" in point) == (point["engine.layout"] == "zero2")
        assert identity(point) not in {identity(one.point) for one in told}
        states = ["done", "pruned", "failed", "running", "done", "done"]
        told.append(Told(point, states[number], float(number), [(1, 2.0)]))  # type: ignore[arg-type]
    other = config.model_copy(update={"method": config.method.model_copy(update={"seed": 4})})
    assert ask(other, told[:1], "lower") != ask(config, told[:1], "lower")


def test_what_was_told_matters(load: Load) -> None:
    """Of many values by one key, the next ones are near the best."""
    config = load({LR: SEARCH[LR]}, method=method(40))
    low = [Told({LR: 10 ** (-4 + i / 5)}, "done", abs(-4 + i / 5 + 1)) for i in range(20)]
    points = [ask(config, [*low, *low[:i]], "lower") for i in range(5)]
    assert all(point is not None and 1e-2 < point[LR] < 1.0 for point in points)


def test_a_space_that_is_used_up_has_no_next_point(load: Load) -> None:
    config = load({"seed": [1, 2]}, method=method())
    told = [Told({"seed": 1}, "done", 1.0), Told({"seed": 2}, "failed")]
    assert ask(config, told, "higher") is None


def test_a_sweep_by_optuna_ends_and_goes_on(
    write: Write, fakes: Callable[..., None], tmp_path: Path
) -> None:
    search = {LR: {"low": 1e-4, "high": 0.1, "scale": "log"}, "engine.layout": ["zero1", "zero2"]}
    found = sweep(write(search, method=method(3)))
    assert found["trials"] == {"done": 3}
    more = sweep(write(search, method=method(5)))
    assert more["trials"] == {"done": 5}
    begun = [r["name"] for r in starts(tmp_path / "sweep") if r["event"] == "start"]
    assert begun == [f"000{i}" for i in range(5)]
    whole = sweep(write(search, method=method(5), sweep_dir=str(tmp_path / "at once")))
    assert {r["number"]: r["point"] for r in whole["rows"]} == {
        r["number"]: r["point"] for r in more["rows"]
    }


def test_a_drawn_point_that_cannot_run_is_a_failed_trial(
    write: Write, fakes: Callable[..., None]
) -> None:
    # Each value can run, both together cannot: 8 layers of 2.
    search = {"engine.layout": ["zero1", "pp2"], "model.num_layers": [2, 1]}
    found = sweep(write(search, method=method(4), skip_impossible=True))
    states = {identity(row["point"]): row["state"] for row in found["rows"]}
    assert sorted(states.values()) == ["done", "done", "done", "failed"]
    assert states[identity({"engine.layout": "pp2", "model.num_layers": 1})] == "failed"


def test_without_optuna_its_extra_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"pip install 'shardwise\[sweep\]'"):
        sweep(write({LR: [1e-3]}, method=method()))
