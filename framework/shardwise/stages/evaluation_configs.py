"""Configs of the evaluations."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardwise.config.schema import EvaluationConfig, NonNegativeInt, Rows, SeqLen
from shardwise.data.config import DataConfig
from shardwise.rewards import RewardConfig, TaskConfig
from shardwise.rollout.config import Sampling


class BitsConfig(EvaluationConfig):
    """Summed loss in bits over the UTF-8 bytes of the validation documents."""

    kind: Literal["bits_per_byte"]
    data: DataConfig | None = Field(
        None, description="default: of the stage, else of the first that has documents"
    )
    seq_len: SeqLen = Field(256, description="tokens of context at most")
    stride: NonNegativeInt = Field(
        0,
        description="0: rows side by side; else rows start this far apart and score their last "
        "``stride`` tokens, so that every token has seq_len - stride of context",
    )
    micro_batch: Rows = 16


class ProblemsConfig(EvaluationConfig):
    """The first ``num_problems`` of the task's held-out split, which nothing trains on."""

    kind: Literal["problems"]
    task: TaskConfig = Field(default_factory=TaskConfig)
    num_problems: Rows = 512
    max_new_tokens: SeqLen = 16
    reward: RewardConfig = Field(
        default_factory=RewardConfig, description="an answer is right when it earns the maximum"
    )
    num_samples_shown: NonNegativeInt = Field(6, description="generations kept for the report")


class ContinuationsConfig(EvaluationConfig):
    """Texts to go on from, as documents (no chat template)."""

    kind: Literal["continuations"]
    prompts: list[str] = Field(min_length=1)
    sampling: Sampling = Field(default_factory=Sampling)
