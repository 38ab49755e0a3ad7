"""Verifiable tasks, verifiers and reward functions."""

from shardwise.rewards.families import Problem
from shardwise.rewards.scored import is_usable, kind_of
from shardwise.rewards.scoring import (
    RewardConfig,
    RewardItem,
    RewardResult,
    Scorer,
    build_reward,
)
from shardwise.rewards.task_configs import (
    AnyTask,
    CountLettersConfig,
    FileTaskConfig,
    TaskConfig,
    fill_for_file,
    split_of,
)
from shardwise.rewards.tasks import (
    ProblemSet,
    majority_baseline,
    messages,
    prompt_messages,
    solution_text,
)
from shardwise.rewards.user import UserRewardConfig

__all__ = [
    "AnyTask",
    "CountLettersConfig",
    "FileTaskConfig",
    "Problem",
    "ProblemSet",
    "RewardConfig",
    "RewardItem",
    "RewardResult",
    "Scorer",
    "TaskConfig",
    "UserRewardConfig",
    "build_reward",
    "fill_for_file",
    "is_usable",
    "kind_of",
    "majority_baseline",
    "messages",
    "prompt_messages",
    "solution_text",
    "split_of",
]
