"""The data that a recipe is written for: their format, and whether a stage learns from such."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.data.config import Reading
from shardwise.data.formats import (
    CONVERSATIONS,
    DOCUMENTS,
    PREFERENCES,
    PROBLEMS,
    Detected,
    detect,
)
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import DataError, UserError
from shardwise.recipes.lengths import (
    Lengths,
    of_conversations,
    of_documents,
    of_problems,
    of_rankings,
)
from shardwise.rewards import FileTaskConfig

MARK = "####"  # what GSM8K (Cobbe et al. 2021) puts before an answer, behind its steps
READS = {
    "pretrain": DOCUMENTS,
    "sft": CONVERSATIONS,
    "dpo": PREFERENCES,
    "reward": PREFERENCES,
    "grpo": PROBLEMS,
}


@dataclasses.dataclass(frozen=True)
class Data:
    """A file, folder or name on the hub, as a recipe names it (``ref``)."""

    ref: str
    found: Detected
    rows: int

    @property
    def section(self) -> dict[str, Any]:
        """The source as a recipe has it."""
        columns = {"columns": dict(self.found.columns)} if self.found.columns else {}
        return {"kind": self.found.format, "path": self.ref, **columns}

    @property
    def words(self) -> str:
        """One line on it."""
        if self.found.format == "text":
            return f"{self.rows:,} file{'s' * (self.rows > 1)}, {self.found.detail}"
        return f"{self.rows:,} rows, told by {self.found.detail}"

    @property
    def unpaired(self) -> bool:
        """Whether its rows have one answer and a label, not a better and a worse one."""
        return self.found.format == "preference" and "label" in self.found.seen

    def task(self, held_out: float | str = 0.0) -> dict[str, Any]:
        """Problems as a recipe has them."""
        section: dict[str, Any] = {**self.section, "kind": "file"}
        if self._marked:
            section["answer_after"] = MARK
        return {**section, "held_out": held_out}

    @property
    def _marked(self) -> bool:
        """Whether every answer that was seen stands behind a mark."""
        name = self.found.columns.get("answer", "answer")
        answers = [row.get(name) for row in self.found.rows]
        return bool(answers) and all(isinstance(a, str) and MARK in a for a in answers)

    def can_be_parted(self, share: float) -> bool:
        """Whether a share of its problems leaves some to learn from, and some held out."""
        try:
            return any(True for _ in as_task(self.task(share)).problems("held_out"))
        except DataError:
            return False

    def lengths(self, stage: str, tokenizer: Tokenizer) -> Lengths:
        """See `recipes.lengths`."""
        if stage == "grpo":
            return of_problems(as_task(self.task()), tokenizer)
        source = DataSource.model_validate({**self.section, "path": Path(self.ref)})
        if stage == "pretrain":
            return of_documents(source, self.rows, tokenizer)
        if stage == "sft":
            return of_conversations(source, self.rows, tokenizer)
        return of_rankings(source, self.rows, tokenizer, Reading(unpaired=self.unpaired))


def as_task(section: dict[str, Any]) -> FileTaskConfig:
    """Problems that a recipe names so."""
    return FileTaskConfig.model_validate_json(json.dumps(section), strict=True)


def look(ref: str, stage: str, columns: Mapping[str, str] | None = None) -> Data:
    """``columns``: our names of some to the data's own.

    Raises DataError for what cannot be told, and UserError for what ``stage`` cannot learn.
    """
    columns = dict(columns or {})
    try:
        found = detect(ref, READS[stage], columns=columns)
    except DataError:
        found = detect(ref, columns=columns)
    found = dataclasses.replace(found, columns={**found.columns, **columns})
    if found.format not in READS[stage]:
        fits = [name for name, formats in READS.items() if found.format in formats]
        raise UserError(
            f"{ref}: holds {found.format} ({found.detail}), and stage {stage} learns from "
            f"{' or '.join(READS[stage])}; of these data, --stage {' or '.join(fits)} learns"
        )
    data = Data(ref, found, found.num_rows())
    if data.unpaired and stage == "reward":
        raise UserError(
            f"{ref}: its rows have one answer and a label; a reward model needs chosen and "
            "rejected. --stage dpo learns from labels, by KTO"
        )
    return data
