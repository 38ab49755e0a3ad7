"""A small house of config classes, put in place of the real registries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from shardwise.config import registry
from shardwise.config.schema import (
    EvaluationConfig,
    ModelConfig,
    NonNegativeFloat,
    PositiveInt,
    Section,
    StageConfig,
)


class ToyModel(ModelConfig):
    family: Literal["toy"] = "toy"
    width: PositiveInt = 8
    weights: Path | None = None


class TextSource(Section):
    kind: Literal["text"] = "text"
    path: Path
    weight: NonNegativeFloat = 1.0


class TableSource(Section):
    kind: Literal["table"] = "table"
    column: str = "body"


class ToyStage(StageConfig):
    kind: Literal["learn"] = "learn"
    sources: list[Annotated[TextSource | TableSource, Field(discriminator="kind")]] = []
    weights: dict[str, float] = {}
    ratio: float | Literal["auto"] = "auto"
    shape: tuple[int, int] = (2, 3)


class ToyEvaluation(EvaluationConfig):
    kind: Literal["count"] = "count"


RECIPE = """\
name: toy
model: {family: toy, width: 16}
engine: {precision: bf16}
stages:
  - kind: learn
    steps: 10
    optimizer:
      lr: 1e-3
    sources:
      - {kind: text, path: a/b.txt}
  - kind: learn
    name: again
    steps: 20
    engine: {recompute: full}
"""


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the toy family, stage and evaluation are registered."""
    monkeypatch.setattr(registry, "discover", lambda: None)
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (registry.MODEL_CONFIGS, {"toy": ToyModel}),
        (registry.STAGE_CONFIGS, {"learn": ToyStage}),
        (registry.EVALUATION_CONFIGS, {"count": ToyEvaluation}),
    ]
    before = [dict(table) for table, _ in tables]
    for table, rows in tables:
        table.clear()
        table.update(rows)
    yield
    for (table, _), rows in zip(tables, before):
        table.clear()
        table.update(rows)
