"""Config of pre-training."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from shardwise.config.schema import StageConfig
from shardwise.data.config import DataConfig


class PretrainConfig(StageConfig):
    """Documents from ``data.sources``, packed into rows of ``batch.seq_len`` tokens."""

    small_seq_len: ClassVar[int] = 32

    kind: Literal["pretrain"]
    data: DataConfig = Field(default_factory=DataConfig)
