"""A job without a model, and what tests do with it inside rank processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from pydantic import Field

from shardwise.config import registry as configs
from shardwise.config.load import load_config
from shardwise.config.schema import JobConfig, PositiveInt, Section
from shardwise.data.source import DataSource
from shardwise.errors import UserError
from shardwise.stages import registry
from shardwise.stages.base import StageContext
from shardwise.stages.jobs import Job, Outcome
from shardwise.stages.run import run_rank
from shardwise.verify.jobs import killed_behind


class ToyData(Section):
    sources: list[DataSource] = Field(default=[])


class ToyConfig(JobConfig):
    outputs = {"texts": "prompt-completion"}

    kind: Literal["toy"]
    items: PositiveInt = 10
    factor: PositiveInt = 2
    chunk: PositiveInt = 4
    data: ToyData = Field(default_factory=ToyData)


class ToyJob(Job):
    """Items are numbers; a row says what comes out when one is multiplied."""

    def __init__(self, ctx: StageContext) -> None:
        self.config = ctx.stage
        self.data_hash = "toy"
        self.chunk, self.num_items = self.config.chunk, self.config.items
        self.before = sum(1 for s in self.config.data.sources for _ in s.told(FORMATS).rows())

    def work(self, items: Sequence[int]) -> list[Any]:
        return [{"item": i, "value": i * self.config.factor + self.before} for i in items]

    def figures(self, records: Sequence[Any]) -> dict[str, float]:
        return {"largest": max(r["value"] for r in records)}

    def finish(self, records: Sequence[Any]) -> Outcome:
        rows = [{"prompt": f"{r['item']}", "completion": f"{r['value']}"} for r in records]
        if self.config.factor == 13:
            raise UserError("thirteen leaves nothing to be written; take another factor")
        return Outcome(
            {"texts": rows if self.config.factor != 12 else []},
            {"sum": sum(r["value"] for r in records)},
        )


FORMATS = ("prompt-completion",)


@contextlib.contextmanager
def known() -> Iterator[None]:
    """The kind ``toy``, for a while: who else runs in this process does not know it."""
    with (
        mock.patch.dict(configs.STAGE_CONFIGS, {"toy": ToyConfig}),
        mock.patch.dict(registry._JOBS, {"toy": ToyJob}),
    ):
        yield


def toy(**keys: Any) -> dict[str, Any]:
    return {"kind": "toy", **keys}


def run(config: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """One rank of the run; returns its summary."""
    with known():
        return run_rank(load_config(config, overrides))


def run_and_die(config: dict[str, Any], parts: int) -> None:
    """One rank of a run that is killed behind so many parts of its jobs."""
    with killed_behind(parts):
        run(config)


def rows_written(folder: Path, job: str = "toy") -> bytes:
    return (folder / "stages" / job / "artifacts" / "texts.jsonl").read_bytes()
