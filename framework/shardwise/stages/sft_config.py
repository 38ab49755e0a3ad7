"""Config of supervised fine-tuning, and what others share that read conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import Rows, SmallSizes, StageConfig, shown
from shardwise.data.config import ChatDataConfig
from shardwise.rewards import AnyTask, fill_for_file

CHATS = {"sources": [{"kind": "chat-jsonl", "path": "chats.jsonl"}]}


class ChatStageConfig(StageConfig):
    """Conversations of files, of a task's problems, or both; the assistant's turns are learnt."""

    data: ChatDataConfig = Field(default_factory=ChatDataConfig)
    task: AnyTask | None = Field(None, description="also learn solutions of these problems")
    num_problems: Rows | None = Field(
        2048, description="problems of the task's train_sft split; null: all of a file, its default"
    )

    @model_validator(mode="after")
    def _all_of_a_file(self) -> Self:
        fill_for_file(self, "num_problems")
        return self

    @model_validator(mode="after")
    def _has_data(self) -> Self:
        if not self.data.sources and self.task is None:
            raise ValueError("give data.sources, or a task, to learn from")
        return self

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """See `StageConfig.shrunk`."""
        found = super().shrunk(small, folder)
        return found.model_copy(update={"num_problems": min(self.num_problems or 64, 64)})


class SftConfig(ChatStageConfig):
    """Loss on the assistant's turns, their end token included."""

    model_config = shown(kind="sft", steps=100, data=CHATS)

    kind: Literal["sft"]
