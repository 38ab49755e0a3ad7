"""Rows for the tests of filters."""

from __future__ import annotations

from typing import Any

from shardwise.curation import FilterRules, HeldOut, HeldOutText, Row
from shardwise.curation.config import ContaminationConfig
from shardwise.curation.rows import row_of


def row(prompt: str, answer: str, /, score: Any = None, where: str = "", **fields: Any) -> Row:
    """A row of a prompt and its completion."""
    data = {"prompt": prompt, "completion": answer, **fields}
    return row_of("prompt-completion", data if score is None else {**data, "score": score}, where)


def rules(*listed: dict[str, Any], **keys: Any) -> FilterRules:
    """A config, as a recipe has it."""
    return FilterRules.model_validate({"rules": list(listed), **keys})


def held_out(*prompts: str, answers: tuple[str, ...] = (), **keys: Any) -> HeldOut:
    """Held-out texts ``exam: 0``, ``exam: 1``, ..., each with the same answers."""
    texts = [HeldOutText(f"exam: {i}", prompt, answers) for i, prompt in enumerate(prompts)]
    return HeldOut(ContaminationConfig.model_validate(keys), texts)
