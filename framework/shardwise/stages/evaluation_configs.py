"""Configs of the evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from shardwise.config.schema import (
    EvaluationConfig,
    NonNegativeInt,
    Rows,
    SeqLen,
    SmallSizes,
    StageConfig,
)
from shardwise.data.config import DataConfig
from shardwise.rewards import RewardConfig, TaskConfig
from shardwise.rollout.config import Sampling
from shardwise.stages.policy_config import small_reward


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
        examples=[128],
    )
    micro_batch: Rows = Field(16, description="rows that a rank computes at once")

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`.

        Rows that overlap if the recipe's do, and of a number that no ranks share evenly: if it can
        be, the last one is alone, so that 2 ranks and 4 have one without a row.
        """
        own = getattr(stage, "data", None)
        if isinstance(own, DataConfig) and self.data is None:
            data = own
        else:  # of an earlier stage, or the standard library
            data = (self.data or DataConfig()).shrunk(folder, small.seq_len)
        documents = (d for s in data.validation_sources() for d in s.documents())
        tokens = sum(len(d.raw) + 1 for d in documents)
        longest = min(self.seq_len, small.seq_len)
        sizes = [(n, self.stride and max(1, self.stride * n // self.seq_len))
                 for n in range(longest, max(1, longest // 2), -1)]  # fmt: skip
        micro = min(self.micro_batch, 2)

        def shared_evenly(size: tuple[int, int]) -> tuple[int, bool]:
            rows = _rows(tokens, *size)
            alone = [rows % n == 1 for n in (4 * micro, 2 * micro, 2)]
            return [*alone, True].index(True), rows % 3 == 0

        seq_len, stride = min(sizes, key=shared_evenly)
        update = {"data": data, "seq_len": seq_len, "stride": stride}
        return self.model_copy(update=update | {"micro_batch": micro})


def _rows(tokens: int, seq_len: int, stride: int) -> int:
    return 1 + max(0, -(-(tokens - seq_len) // (stride or seq_len)))


class ProblemsConfig(EvaluationConfig):
    """The first ``num_problems`` of the task's held-out split, which nothing trains on."""

    small_seq_len = 160

    kind: Literal["problems"]
    task: TaskConfig = Field(default_factory=TaskConfig)
    num_problems: Rows = Field(512, description="how many")
    max_new_tokens: SeqLen = Field(16, description="of an answer")
    reward: RewardConfig = Field(
        default_factory=RewardConfig, description="an answer is right when it earns the maximum"
    )
    num_samples_shown: NonNegativeInt = Field(6, description="generations kept for the report")

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`; an untrained model is right here and there."""
        return self.model_copy(
            update={
                "num_problems": min(self.num_problems, 11),
                "max_new_tokens": min(self.max_new_tokens, 4),
                "reward": small_reward(folder),
            }
        )


class ContinuationsConfig(EvaluationConfig):
    """Texts to go on from, as documents (no chat template)."""

    small_seq_len = 64

    kind: Literal["continuations"]
    prompts: list[str] = Field(
        min_length=1, description="beginnings", examples=[["def read(self, "]]
    )
    sampling: Sampling = Field(default_factory=Sampling)

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`."""
        length = min(self.sampling.max_new_tokens, 6)
        sampling = self.sampling.model_copy(update={"max_new_tokens": length})
        return self.model_copy(update={"prompts": self.prompts[:3], "sampling": sampling})
