"""Jobs: what makes data outside of the training loop, resumable in the middle.

A job works through numbered items (problems, rows). What an item gives is a pure function of
(seed, job, item), so it does not matter which rank works on it, in which company, or in which
attempt. A chunk of items is one durable file; a job that was killed goes on behind the last one.
When all are there, the job's artifacts are written, and the parts go.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from shardwise import integrity
from shardwise.checkpoint.ranks import Ranks
from shardwise.config.schema import JobConfig
from shardwise.errors import CheckpointError, UserError
from shardwise.metrics.jsonl import line_of
from shardwise.metrics.progress import Progress
from shardwise.resilience.gate import Gate, Point
from shardwise.stages.base import StageContext
from shardwise.stages.lineage import Lineage, LineageError, changed_hashes, check_hashes
from shardwise.stages.results import read_here, write_result
from shardwise.storage.durable import write_durably

PARTS, ARTIFACTS = "parts", "artifacts"
T = TypeVar("T")
_PART = re.compile(r"(\d{8})-(\d{8})\.json")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job has made: rows by artifact, as its config's ``outputs`` names them; figures.

    ``message``: lines that are said of it.

    ``skip``: later stages that need not run. ``drop``: earlier ones whose models nobody starts from
    who does not name them.
    """

    rows: Mapping[str, Iterable[Mapping[str, Any]]]
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""
    skip: Sequence[str] = ()
    drop: Sequence[str] = ()


class Job:
    """One kind of job. Registered in `stages.registry` beside its config class."""

    data_hash: str  # of what it reads, but artifacts of earlier jobs
    num_items: int = 0
    chunk: int = 16  # items of a part
    cheap: bool = False  # parts of another recipe are made again, not refused
    tp: int = 1  # neighbouring ranks that work on the same items; the first one's values count

    def work(self, items: Sequence[int]) -> list[Any]:
        """Plain JSON, one value an item. Each rank has items of its own, and may have none.

        Ranks call it equally often, so it may hold collective calls, also of the ``tp`` ranks that
        have the same items.
        """
        raise NotImplementedError

    def figures(self, records: Sequence[Any]) -> dict[str, float]:
        """How it goes, from some items' values; shown while the job runs."""
        return {}

    def finish(self, records: Sequence[Any]) -> Outcome:
        """The artifacts from the values of all items, in order; rank 0 alone calls it.

        Raises UserError where nothing is left to be written.
        """
        raise NotImplementedError


class JobRun:
    """Runs one job in its folder; every rank makes one."""

    def __init__(
        self, ctx: StageContext, job: Job, lineage: Lineage, progress: Progress, gate: Gate
    ) -> None:
        self.ctx, self.job, self.lineage = ctx, job, lineage
        self.progress, self.gate = progress, gate
        self.config: JobConfig = ctx.stage
        self.folder = ctx.directory / "stages" / self.config.name
        self.ranks = Ranks.of(None)

    def run(self) -> dict[str, Any]:
        """Work to the end; what result.json says of the artifacts, and the job's figures."""
        name, total = self.config.name, self.job.num_items
        began = time.perf_counter()
        part, done = self._on_main(self._done)
        if part:
            self.ctx.logger.note("resumed", f"continued behind item {done}", name, part)
        self.ctx.logger.rewind(name, part or -1)
        self.progress.announce(name, total)
        self.gate.stage(part, self._point(part))
        while done < total:
            self.gate.step()
            items = range(done, min(done + self.job.chunk, total))
            part, done = part + 1, items.stop
            figures = self.work_on(part, items)
            self.progress.update(name, done, figures)
            self.gate.completed(part, self._point(part))
        outcome = self._on_main(lambda: self._write(self.job.finish(self._records())))
        return outcome | {"items": total, "seconds": time.perf_counter() - began}

    def remove_parts(self) -> None:
        """Once the result says that the artifacts are whole."""
        if self.ctx.is_main:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def work_on(self, part: int, items: range) -> dict[str, float]:
        """Work on some items together, and keep what they give; on rank 0, their figures."""
        tp = self.job.tp
        mine = items[self.ranks.rank // tp :: self.ranks.size // tp]
        parts = self.ranks.collect(self.job.work(mine))[::tp]
        figures: dict[str, float] = {}
        with self.ranks.together():
            if self.ctx.is_main:
                records = [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]
                file = self.folder / PARTS / f"{items.start:08d}-{items.stop:08d}.json"
                figures = self.job.figures(records)
                self.ctx.logger.log(self.config.name, part, figures, force=True)
                self.ctx.logger.sync()
                stamp = {"lineage": dataclasses.asdict(self.lineage)}
                write_result(file, stamp | {"records": records})
        return figures

    def _on_main(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, plain JSON, on every rank; what it refuses, all refuse."""
        answer: dict[str, Any] = {}
        with self.ranks.together():
            if self.ctx.is_main:
                try:
                    answer = {"value": compute()}
                except (UserError, LineageError) as error:
                    answer = {"refused": str(error), "lineage": isinstance(error, LineageError)}
        answer = self.ranks.share(answer)
        if "refused" in answer:
            raise (LineageError if answer["lineage"] else UserError)(answer["refused"])
        value: T = answer["value"]
        return value

    def _point(self, part: int) -> Point:
        return Point(self.config.name, part, lambda: self.folder, durable=True)

    def _parts(self) -> list[Path]:
        """Parts that follow one another from the first item on."""
        found, end = [], 0
        for path in sorted((self.folder / PARTS).glob("*.json")):
            match = _PART.fullmatch(path.name)
            if match and int(match[1]) == end:
                found.append(path)
                end = int(match[2])
        return found

    def _done(self) -> tuple[int, int]:
        """Parts and items that need no work; one that is damaged is set aside and made again."""
        number = done = 0
        for path in self._parts():
            part = read_here(path, ("lineage", "records"))
            if part is None:
                break
            if self.job.cheap and changed_hashes(part["lineage"], self.lineage):
                shutil.rmtree(self.folder / PARTS)
                break
            check_hashes(self.config.name, "parts", part["lineage"], self.lineage)
            number, done = number + 1, done + len(part["records"])
        return number, done

    def _records(self) -> list[Any]:
        parts = [read_here(path, ("records",)) for path in self._parts()]
        records = [record for part in parts for record in (part or {"records": []})["records"]]
        if len(records) != self.job.num_items:
            raise CheckpointError(
                f"{self.folder / PARTS}: holds {len(records)} of {self.job.num_items} items; "
                "something has removed parts; start the run again"
            )
        return records

    def _write(self, outcome: Outcome) -> dict[str, Any]:
        artifacts = {}
        assert set(outcome.rows) == set(self.config.outputs), "a job writes what it declares"
        for name, rows in outcome.rows.items():
            lines = [line_of(row) for row in rows]
            data = b"".join(lines)
            file = self.folder / ARTIFACTS / f"{name}.jsonl"
            write_durably(file, data)
            artifacts[name] = {
                "path": str(file.relative_to(self.ctx.directory)),
                "format": self.config.outputs[name],
                "rows": len(lines),
                **integrity.entry(data),
            }
        if outcome.message:
            self.progress.message(f"{self.config.name}:\n{outcome.message}")
        decided = {"skip": list(outcome.skip), "drop": list(outcome.drop)}
        return {"artifacts": artifacts, "metrics": dict(outcome.metrics), **decided}


def check_artifacts(directory: Path, result: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless every artifact of a finished job is what it was; rank 0 looks.

    A collective call.
    """
    with Ranks.of(None).together():
        for artifact in result["artifacts"].values() if dist.get_rank() == 0 else ():
            file = directory / artifact["path"]
            try:
                sound = integrity.entry(file.read_bytes()).items() <= artifact.items()
            except OSError:
                sound = False
            if not sound:
                raise CheckpointError(
                    f"{file}: is not what stage {result['name']} wrote; bring it back, or remove "
                    f"{directory / 'stages' / result['name']} to make it again"
                )
