"""What a recipe says about data."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import DataSection, Fraction, PositiveInt
from shardwise.data.formats import CONVERSATIONS, DOCUMENTS, PREFERENCES, STEPS
from shardwise.data.parts import WHOLE, Part
from shardwise.data.source import DataSource
from shardwise.data.stand_ins import small_sources

TooLong = Literal["truncate", "drop", "error"]
Turns = Literal["together", "apart"]
Texts = Literal["chat", "raw"]
TEXTS = "a plain text is a turn of a chat, or stands as it is"


@dataclasses.dataclass(frozen=True)
class Reading:
    """How rows of preferences are read.

    ``strict``: fields that nothing reads are refused, instead of named once. ``unpaired``: rows of
    a completion and its label are read, too. ``raw``: texts stand as they are, without a
    template. ``max_prompt``: longer
    prompts lose their first tokens, and that is counted. ``max_tokens``: of a prompt with its
    longest answer; a row beyond is an error, or with ``drop`` left out and counted. ``part``: of
    the rows, by their prompts.
    """

    strict: bool = False
    unpaired: bool = False
    raw: bool = False
    max_prompt: int | None = None
    max_tokens: int | None = None
    drop: bool = False
    part: Part = WHOLE


@dataclasses.dataclass(frozen=True)
class StepReading(Reading):
    """How rows of steps are read. ``separator``: of a text's steps. ``truncate``: long rows.

    ``hard_above``: labels above it become 1, others 0; None: they are chances.
    """

    separator: str = "\n"
    hard_above: float | None = None
    truncate: bool = False


class DataConfig(DataSection):
    """Training sources, and what is kept for validation."""

    reads: ClassVar[tuple[str, ...]] = DOCUMENTS

    sources: list[DataSource] = Field(
        default_factory=lambda: [DataSource()], min_length=1, description="what is trained on"
    )
    validation: list[DataSource] = Field(
        default_factory=list,
        description="default: held_out, or the standard library's own split",
        examples=[[{"kind": "text", "path": "held_out/*.txt"}]],
    )
    held_out: Fraction = Field(
        0.0,
        description="share of training documents, by hash of content, kept for validation",
        examples=[0.05],
    )
    strict_fields: bool = Field(
        False, description="refuse rows with fields that nothing reads, instead of naming them"
    )

    @model_validator(mode="after")
    def _one_way_to_validate(self) -> DataConfig:
        if self.validation and self.held_out:
            raise ValueError("give validation sources or held_out, not both")
        for source in (*self.sources, *self.validation):
            if source.format in (*PREFERENCES, *STEPS):
                raise ValueError(f"pre-training reads documents, not {source.kind} sources")
        if len(self.validation) > 1 and any(s.kind == "indexed" for s in self.validation):
            raise ValueError("an indexed validation source must be the only one")
        for source in self.validation:
            for other in self.sources:
                splits = {source.split, other.split}
                same = (source.subset, source.path) == (other.subset, other.path)
                if same and (len(splits) == 1 or "all" in splits):
                    raise ValueError(
                        f"{source.label} is a training and a validation source at once"
                    )
        if self.held_out and any(s.kind == "indexed" for s in self.sources):
            raise ValueError("held_out needs raw documents; give an indexed validation source")
        return self

    def validation_sources(self) -> list[DataSource]:
        """Where validation documents come from (with ``held_out``: the training sources)."""
        if self.validation:
            return self.validation
        if self.held_out:
            return self.sources
        train = [s for s in self.sources if s.kind == "stdlib" and s.split == "train"]
        return [s.model_copy(update={"split": "validation"}) for s in train]

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """See `DataSection.shrunk`."""
        sources = small_sources(self.sources, folder, "train")
        if self.held_out and sources == self.sources:
            return self
        apart = [DataSource()] if self.held_out else self.validation_sources()
        validation = small_sources(apart, folder, "validation")
        updates = {"sources": sources, "validation": validation, "held_out": 0.0}
        return self.model_copy(update=updates)


class RowsConfig(DataSection):
    """What sections of rows share that are read whole: where they are, and what is held out."""

    reads: ClassVar[tuple[str, ...]]
    reader: ClassVar[str]

    sources: list[DataSource] = Field(default_factory=list, description="what is trained on")
    validation: list[DataSource] = Field(
        default_factory=list,
        description="what is measured in between; default: held_out",
        examples=[[{"path": "held_out.jsonl"}]],
    )
    held_out: Fraction = Field(
        0.0, description="share of the rows, by hash of what is asked, kept for validation"
    )
    strict_fields: bool = Field(
        False, description="refuse rows with fields that nothing reads, instead of naming them"
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        for source in (*self.sources, *self.validation):
            if source.kind != "auto" and source.format not in self.reads:
                raise ValueError(
                    f"{self.reader} (kind {', '.join(self.reads)}, or left out), not {source.kind} "
                    "sources"
                )
            if source.weight != 1.0:
                raise ValueError(
                    f"weight {source.weight:g}: sources of rows are read whole and shuffled "
                    "together, so they have no weight; leave it out, or repeat lines in the file"
                )
        if self.validation and self.held_out:
            raise ValueError("give validation sources or held_out, not both")
        return self

    def training(self) -> tuple[list[DataSource], Part]:
        """Where training rows are."""
        return self.sources, Part(self.held_out)

    def measured(self) -> tuple[list[DataSource], Part]:
        """Where validation rows are."""
        if self.held_out:
            return self.sources, Part(self.held_out, held_out=True)
        return self.validation, WHOLE


class ChatDataConfig(RowsConfig):
    """Conversations for fine-tuning."""

    reads = CONVERSATIONS
    reader = "fine-tuning reads conversations"

    sources: list[DataSource] = Field(
        default_factory=list,
        description="what is trained on",
        examples=[[{"kind": "messages", "path": "chats.jsonl"}]],
    )
    pack: bool = Field(True, description="several examples in a row, without leaking")
    too_long: TooLong = Field("error", description="what to do with examples over seq_len")
    turns: Turns = Field(
        "together",
        description="apart: an example for each assistant turn, ending with it, for templates that "
        "render earlier turns otherwise (drop their thoughts)",
    )
    texts: Texts = Field("chat", description=f"prompt-completion: {TEXTS}")

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """See `DataSection.shrunk`; in bytes, more is too long than in the user's tokens."""
        return self.model_copy(update=_small(self, folder) | {"too_long": "truncate"})


class PreferenceDataConfig(RowsConfig):
    """Preferences from files."""

    reads = PREFERENCES
    reader = "this stage reads preferences"

    sources: list[DataSource] = Field(
        default_factory=list,
        description="what is trained on",
        examples=[[{"kind": "preference", "path": "pairs.jsonl"}]],
    )
    too_long: Literal["error", "drop"] = Field(
        "error", description="rows over batch.seq_len; answers are never cut"
    )

    def reading(self, seq_len: int) -> Reading:
        """How the rows of its sources are read, for rows of ``seq_len`` tokens."""
        drop = self.too_long == "drop"
        return Reading(strict=self.strict_fields, max_tokens=seq_len, drop=drop)

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """See `DataSection.shrunk`."""
        return self.model_copy(update=_small(self, folder, seq_len))


class PairDataConfig(PreferenceDataConfig):
    """Preferences of which the policy itself learns."""

    texts: Texts = Field("chat", description=TEXTS)
    max_prompt_length: PositiveInt | None = Field(
        None, description="longer prompts lose their first tokens, and are counted", examples=[512]
    )

    def reading(self, seq_len: int) -> Reading:
        """See `PreferenceDataConfig.reading`."""
        return dataclasses.replace(
            super().reading(seq_len),
            raw=self.texts == "raw",
            max_prompt=self.max_prompt_length,
        )

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """See `DataSection.shrunk`; in bytes, more is too long than in the user's tokens."""
        return super().shrunk(folder, seq_len).model_copy(update={"too_long": "drop"})


class StepDataConfig(RowsConfig):
    """Answers in steps, each with a label."""

    reads = STEPS
    reader = "this stage reads steps with their labels"

    sources: list[DataSource] = Field(
        default_factory=list,
        description="what is trained on",
        examples=[[{"kind": "steps", "path": "steps.jsonl"}]],
    )
    separator: str = Field(
        "\n",
        description="written between the steps of a list, and where a text is cut into steps; "
        "empty: steps stand one behind another",
    )
    hard_above: float | None = Field(
        None,
        ge=-1e12,
        le=1e12,
        description="hard labels: a step is right if its label is above this; null: labels are "
        "the chances of that, from 0 to 1",
        examples=[0.5],
    )
    too_long: TooLong = Field(
        "error",
        description="rows over batch.seq_len; truncate: behind the last step that fits",
    )

    def reading(self, seq_len: int) -> StepReading:
        """How the rows of its sources are read, for rows of ``seq_len`` tokens."""
        return StepReading(
            strict=self.strict_fields,
            max_tokens=seq_len,
            drop=self.too_long == "drop",
            separator=self.separator,
            hard_above=self.hard_above,
            truncate=self.too_long == "truncate",
        )

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """See `DataSection.shrunk`; in bytes, more is too long than in the user's tokens."""
        return self.model_copy(update=_small(self, folder, seq_len) | {"too_long": "truncate"})


def _small(data: RowsConfig, folder: Path, longest: int | None = None) -> dict[str, Any]:
    sources = small_sources(data.sources, folder, "train", data.reads, longest)
    if data.held_out and sources == data.sources:
        return {}
    apart = data.sources if data.held_out else data.validation
    validation = small_sources(apart, folder, "validation", data.reads, longest)
    return {"sources": sources, "validation": validation, "held_out": 0.0}


def __getattr__(name: str) -> Any:
    """What stood here while recipes needed torch is found in `datasets`."""
    if name in ("build_chat_examples", "build_pretrain_dataset", "pack_examples"):
        return getattr(importlib.import_module("shardwise.data.datasets"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
