"""reasoning-gym as a source: disjoint splits, its own score in the sandbox."""

from __future__ import annotations

import pytest

from shardwise.errors import ConfigError
from shardwise.rewards import ProblemSet, RewardConfig, RewardItem, build_reward
from shardwise.rewards.task_configs import ReasoningGymTaskConfig

pytest.importorskip("reasoning_gym")


def test_problems_and_their_own_score() -> None:
    config = ReasoningGymTaskConfig(name="basic_arithmetic")
    problems = ProblemSet(config, "held_out", 4)
    other = ProblemSet(config.model_copy(update={"seed": 1}), "train_rl", 20)
    assert not {p.question for p in problems} & {p.question for p in other}
    with build_reward(RewardConfig(parts=[{"kind": "reasoning_gym"}])) as scorer:
        items = [RewardItem(p.question, p.answer, p.answer, p.meta) for p in problems]
        wrong = [RewardItem(p.question, "no idea", p.answer, p.meta) for p in problems]
        assert [r.value for r in scorer.score(items)] == [1.0] * 4
        assert scorer.sandboxes[0].config.seconds_for(2048) == 20.0 * 2048 / 4
        assert all(r.value is not None and r.value < 0.1 for r in scorer.score(wrong))


def test_unknown_names_and_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'letter_counting'"):
        ProblemSet(ReasoningGymTaskConfig(name="leter_counting"), "held_out", 1)
    config = ReasoningGymTaskConfig(name="letter_counting", options={"min_words": 0})
    with pytest.raises(ConfigError, match=r"task\.options"):
        ProblemSet(config, "held_out", 1)
