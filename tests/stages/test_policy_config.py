"""The reward of small recipes: it refuses some texts and whole groups, whoever asks."""

from __future__ import annotations

from pathlib import Path

from shardwise.rewards import RewardItem, build_reward
from shardwise.stages.policy_config import small_reward

SAMPLES = 3


def test_it_refuses_some_and_whole_groups(tmp_path: Path) -> None:
    items = [RewardItem(f"q{i}", f"text {i} {j}", "") for i in range(8) for j in range(SAMPLES)]
    with build_reward(small_reward(tmp_path, refuses=True)) as scorer:
        values = [scored.value for scored in scorer.score(items)]
        backwards = [scored.value for scored in scorer.score(items[::-1])]
    assert backwards[::-1] == values
    groups = [values[i : i + SAMPLES] for i in range(0, len(values), SAMPLES)]
    whole = [group for group in groups if all(value is None for value in group)]
    some = [group for group in groups if None in group and group not in whole]
    assert 0 < len(whole) < len(groups) - len(some) and some


def test_otherwise_it_pays_all(tmp_path: Path) -> None:
    items = [RewardItem("q", f"text {i}", "") for i in range(20)]
    with build_reward(small_reward(tmp_path)) as scorer:
        assert all(scored.value is not None for scored in scorer.score(items))
