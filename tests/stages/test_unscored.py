"""Rewards do not fail in silence: reasons are named, nothing is learnt from nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.engines.native import NativeEngine
from shardwise.rewards import kind_of
from shardwise.rewards.scored import MAX_REWARD, is_usable, scored, unscorable
from shardwise.stages.groups import Group
from shardwise.stages.policy import PolicyStage
from shardwise.stages.unscored import MAX_KINDS, UnscorableError, Unscored
from shardwise.verify.pool import RankError
from tests.stages.recipes import TASK, metrics, recipe, run, run_and_die
from tests.support.pool import RankPool

NOTHING = "the reward function returned None"


def rewarded(folder: Path, body: str, *kinds: str) -> dict[str, Any]:
    """A run whose last stage is rewarded by a function of this body."""
    file = folder.parent / "mine.py"
    file.write_text(f"def score(question, completion, answer, meta):\n    {body}\n")
    config = recipe(folder, *kinds)
    config["stages"][-1]["reward"] = {"parts": [{"kind": "user", "function": f"{file}:score"}]}
    return config


def events(folder: Path, event: str) -> list[str]:
    return [r["message"] for r in metrics(folder) if r.get("event") == event]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_reward_that_never_scores_ends_the_run(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run"
    limit = f"stages.{kind}.max_unscorable_steps=2"
    with pytest.raises(RankError, match=f"2 steps in a row without .*{NOTHING}"):
        ranks.run(run, rewarded(folder, "return None", kind), limit, world=1)
    rows = [r for r in metrics(folder) if r["kind"] == "train"]
    assert len(rows) == 1 and rows[0]["unscorable_fraction"] == 1.0
    means = {"reward_mean", "reward_std", "degenerate_fraction", "return_mean", "kl_response"}
    means |= {"loss", "grad_norm", "explained_variance", "verifier_mean"}
    assert not means & rows[0].keys(), "a mean over nothing is not there, and nothing was learnt"
    (named,) = events(folder, "unscorable")
    assert named.endswith(f"completions without score: score: {NOTHING}")
    assert len(events(folder, "unscorable_step")) == 2
    stored = (folder / f"rollouts/{kind}/step_00000001.jsonl").read_text().splitlines()
    assert all(json.loads(line)["reason"] == f"score: {NOTHING}" for line in stored)


def test_a_short_stage_without_any_score_is_not_done(ranks: RankPool, tmp_path: Path) -> None:
    config = rewarded(tmp_path / "run", "raise ValueError(len(completion))", "grpo")
    with pytest.raises(RankError, match=r"4 steps in a row .*ValueError"):
        ranks.run(run, config, world=1)


def test_reasons_are_named_once_a_kind_and_resume_repeats_none(
    ranks: RankPool, tmp_path: Path
) -> None:
    body = (
        "n = sum(map(ord, completion)) % 3\n    if n == 0: raise KeyError(completion)\n"
        "    return [1e300, 0.5][n - 1]"
    )
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    ranks.run(run, rewarded(clean, body, "grpo"), world=1)
    config = rewarded(broken, body, "grpo")
    ranks.run(run_and_die, config, "grpo", 3, world=1)
    ranks.run(run, config, world=1)
    found = events(clean, "unscorable")
    assert events(broken, "unscorable") == found
    assert sorted("KeyError" in text for text in found) == [False, True]
    assert any("1e+300; more than 1e+12 cannot be averaged" in text for text in found)
    for row in (r for r in metrics(clean) if r["kind"] == "train"):
        assert 0 < row["unscorable_fraction"] < 1
        assert row["reward_mean"] == 0.5 and row["reward_std"] == 0.0
        assert not any(name.endswith("_nonfinite") for name in row)


def half_scored(config: dict[str, Any], *overrides: str) -> int:
    """The first half of each rollout has no score; returns the number of updates."""
    original = PolicyStage.experienced

    def experienced(self: PolicyStage, step: int, groups: Sequence[Group]) -> bool:
        for group in groups[: len(groups) // 2]:
            group.rewards = [None] * len(group.rewards)
        return original(self, step, groups)

    update = NativeEngine.step
    with (
        mock.patch.object(PolicyStage, "experienced", experienced),
        mock.patch.object(NativeEngine, "step", autospec=True, side_effect=update) as updates,
    ):
        run(config, *overrides)
    return updates.call_count


@pytest.mark.parametrize(("kind", "models"), [("grpo", 1), ("ppo", 2)])
def test_a_mini_batch_without_any_score_makes_no_update(
    ranks: RankPool, tmp_path: Path, kind: str, models: int
) -> None:
    values = {"steps": 1, "updates_per_rollout": 2, "epochs_per_rollout": 2}
    options = [f"stages.{kind}.{name}={value}" for name, value in values.items()]
    found = ranks.run(half_scored, recipe(tmp_path / "run", kind), *options, world=1)
    assert found == [2 * models]


def test_an_accuracy_of_nothing_is_none(ranks: RankPool, tmp_path: Path) -> None:
    config = rewarded(tmp_path / "run", "return None", "sft")
    part = config["stages"][0].pop("reward")
    some = {"kind": "problems", "task": TASK, "num_problems": 6, "max_new_tokens": 2}
    half = "return None if len(question) % 2 else 0.0"
    (tmp_path / "half.py").write_text(f"def half(question, completion, answer, meta): {half}")
    other = {"parts": [{"kind": "user", "function": f"{tmp_path / 'half.py'}:half"}]}
    config["evaluations"] = [some | {"reward": part}]
    [summary] = ranks.run(run, config, "stages.sft.steps=1", world=1)
    figures = summary["stages"][0]["metrics"]
    assert "accuracy" not in figures and summary["accuracy"] == {}
    assert figures["num_unscorable"] == 6 and figures["num_problems"] == 0
    assert events(tmp_path / "run", "unscorable")[-1].endswith(NOTHING)
    config["evaluations"] = [some | {"reward": other}]
    config["run_dir"] = str(tmp_path / "half")
    [summary] = ranks.run(run, config, "stages.sft.steps=1", world=1)
    figures = summary["stages"][0]["metrics"]
    assert figures["num_problems"] + figures["num_unscorable"] == 6
    assert figures["num_problems"] == 0 or figures["accuracy"] == 0.0


reasons = st.lists(st.sampled_from(["", "a: X: 1", "a: X: 2", "b: Y 1.5", "b: Y 22"]), min_size=1)


@given(st.lists(reasons, min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 7))
def test_steps_in_a_row_are_counted_through_a_resume(
    steps: list[list[str]], limit: int, cut: int
) -> None:
    watch = Unscored("s", limit)
    named: list[str] = []
    for i, step in enumerate(steps):
        if i == cut:
            state = json.loads(json.dumps(watch.state_dict()))
            watch = Unscored("s", limit)
            watch.load_state_dict(state)
        empty = [all(s) for s in steps[: i + 1]]
        ends = all(empty[-limit:]) and len(empty) >= limit
        ends = ends or (i == len(steps) - 1 and all(empty))
        try:
            assert watch.step(step, i == len(steps) - 1) is not empty[-1]
            assert not ends
        except UnscorableError as error:
            assert ends and next(r for r in step if r) in str(error)
        named += [text for kind, text in watch.events() if kind == "unscorable"]
        if ends:
            break
    kinds = {kind_of(r) for step in steps[: i + 1] for r in step if r}
    assert len(named) == len(kinds) <= 2


def test_endless_kinds_do_not_flood() -> None:
    watch = Unscored("s", 9)
    watch.step([f"a: {chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(99)] + [""], False)
    assert len(watch.events()) == MAX_KINDS + 1


@given(st.floats())
def test_what_is_learnt_from_is_finite_and_has_finite_squares(value: float) -> None:
    result = scored(value, "it returned")
    assert (result.value is not None) == is_usable(value)
    if result.value is None:
        assert result.reason.startswith("it returned")
    else:
        assert abs(result.value) <= MAX_REWARD and str(result.value) != "-0.0"


@given(st.text())
def test_reasons_are_one_printable_line(text: str) -> None:
    assert unscorable(text).reason.isprintable()
