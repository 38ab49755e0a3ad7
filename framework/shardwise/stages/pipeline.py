"""The pipeline of stages: each stage's checkpoint feeds the next, lineage is stored.

A stage that is finished under the same config and parent is not run again; one that was killed
goes on from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise import checkpoint
from shardwise.checkpoint import manifest
from shardwise.checkpoint.manifest import DamagedError
from shardwise.checkpoint.ranks import Ranks
from shardwise.checkpoint.steps import step_of
from shardwise.config.artifacts import artifacts_of, resolved
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig, StageConfig
from shardwise.data import left_out
from shardwise.data.tokenizer import Tokenizer
from shardwise.engines.base import Engine
from shardwise.errors import CheckpointError, ConfigError, DataError
from shardwise.metrics.gemm import measured_rate
from shardwise.metrics.progress import Progress
from shardwise.metrics.writers import LEFT_OUT, MetricsLogger
from shardwise.parallel.collectives import sum_over
from shardwise.parallel.mesh import pick_device
from shardwise.precision.policy import precision_of
from shardwise.resilience.gate import Gate
from shardwise.stages.arithmetic import arithmetic
from shardwise.stages.base import StageContext, checkpoint_root, evaluations_of
from shardwise.stages.estimate import estimate, expectation
from shardwise.stages.jobs import JobRun, check_artifacts
from shardwise.stages.lineage import Lineage, check_hashes, check_lineage, lineage_of
from shardwise.stages.loop import Loop
from shardwise.stages.policy import PolicyStage
from shardwise.stages.registry import build_job, build_stage, run_evaluation
from shardwise.stages.results import RESULT_FILE, read_result, write_result
from shardwise.stages.skipped import counted, too_many

START_FILE = "start.json"
JOB_KEYS = ("name", "artifacts", "data_hash", "metrics", "skip", "drop")
RESULT_KEYS = ("name", "checkpoint", "checkpoint_hash", "data_hash", "metrics")


class Pipeline:
    """Runs the stages of one config in one directory; every rank makes one."""

    def __init__(
        self,
        run: RunConfig,
        tokenizer: Tokenizer,
        logger: MetricsLogger,
        progress: Progress,
        gate: Gate | None = None,
        rate: Callable[[torch.dtype, torch.device], float] | None = None,
    ) -> None:
        """``gate``: of a run that may be told to stop. ``rate``: FLOP/s of this rank's GEMMs."""
        self.gate, self.rate = gate or Gate(), rate or measured_rate
        self.run, self.tokenizer, self.logger, self.progress = run, tokenizer, logger, progress
        self.gemm: dict[str, float] = {}
        # What jobs have written, as ``job.artifact``: where it is, its hash and rows.
        self.artifacts: dict[str, Path] = {}
        self.hashes: dict[str, str] = {}
        self.rows: dict[str, int] = {}
        self.stopped = ""  # why the last stage that ran is not done

    def expected(self) -> dict[str, float | None]:
        """Seconds that each stage still to run will take here, also said aloud; see `estimate`."""
        done: dict[str, int] = {}
        for stage in self.run.training:
            newest = self._newest(stage)
            done[stage.name] = 0 if newest is None else step_of(newest)
            if done[stage.name] < stage.steps:
                self.gemm_rate(stage, pick_device(stage.engine.device))
        found = estimate(self.run, self.tokenizer, self.gemm, dist.get_world_size(), done)
        if found:
            self.progress.message(expectation(found, self.gemm))
        return found

    def run_all(self) -> list[dict[str, Any]]:
        """All stages in order; their results, as stored in each stage's result.json.

        A stage that skipped too many of its updates is the last one; `stopped` says so.
        """
        results: list[dict[str, Any]] = []
        done: dict[str, Path] = {}
        skipped: set[str] = set()
        dropped: set[str] = set()
        for stage in self.run.stages:
            if stage.name in skipped:
                continue
            writers = [
                s.name
                for s in self.run.training
                if s.name in done.keys() - dropped and s.head == "vocabulary"
            ]
            parent = done.get(stage.start_from or (writers or [""])[-1])
            if not isinstance(stage, StageConfig):
                results.append(self._job(stage, parent, done))
                skipped |= set(results[-1]["skip"])
                dropped |= set(results[-1]["drop"])
                continue
            result = self._finished(stage, parent)
            if result is None:
                result = self._run_stage(stage, parent, done)
            else:
                self.progress.message(f"{stage.name}: finished before, nothing to do")
            results.append(result)
            if words := too_many(result, stage.max_skipped):
                self.stopped = (
                    f"stage {stage.name}: {words}; its weights are hardly trained, and no other "
                    "stage starts from them. Lower optimizer.lr, try engine.precision=bf16, or set "
                    f"stages.{stage.name}.max_skipped=1.0 to take them as they are"
                )
                self.logger.note("mostly_skipped", self.stopped, stage.name, stage.steps)
                break
            done[stage.name] = Path(self.run.directory, result["checkpoint"])
        return results

    def start_metrics(self) -> dict[str, Any]:
        """The evaluations on what ``init_from`` holds, measured once a run."""
        writers = [s for s in self.run.training if s.head == "vocabulary"]
        if not self.run.evaluate_start or not writers:
            return {}
        path = self.run.directory / START_FILE
        if (stored := read_result(path)) is not None:
            return stored
        stage = writers[0].model_copy(update={"name": "start"})
        if stage.adapter is not None and stage.adapter.start == "new":
            stage = stage.model_copy(update={"adapter": None})
        ctx = StageContext(
            self.run, stage, self.tokenizer, self.run.directory, self.logger, None, {}
        )
        engine = ctx.engine(None)
        ctx.load_initial_weights(engine)
        found = evaluate_all(ctx, engine, self.progress, step=0)
        if dist.get_rank() == 0:
            write_result(path, found)
        dist.barrier()
        return found

    # --- one stage ------------------------------------------------------------------------------

    def _finished(self, stage: StageConfig, parent: Path | None) -> dict[str, Any] | None:
        """The stored result of a stage that needs no work. All ranks read the same files.

        A result without its checkpoint is no reason to train again, unless an older one is there
        to go on from: then that is said. Raises CheckpointError.
        """
        path = self._result_path(stage)
        root = checkpoint_root(self.run.directory, stage.name)
        newest = self._newest(stage)
        result = read_result(path, RESULT_KEYS)
        if result is None:
            return None
        if newest is None:
            raise CheckpointError(
                f"{path}: says that stage {stage.name} is finished, but {root} holds no "
                "checkpoint; bring it back, or remove this file to train the stage again"
            )
        if result.get("steps", stage.steps) < stage.steps:
            return None  # it was given more
        final = self.run.directory / result["checkpoint"]
        try:
            if manifest.read(final).digest != result["checkpoint_hash"]:
                raise DamagedError(f"{final} is another checkpoint than that of {path}")
        except DamagedError as error:
            words = f"finished, but its last checkpoint is not what it was ({error})"
            self.progress.message(f"{stage.name}: {words}; going on from {newest.name}")
            self.logger.note("checkpoint_lost", words, stage.name, stage.steps)
            return None
        wanted = self._lineage(stage, result["data_hash"], parent)
        check_lineage(self.run, stage, self.tokenizer.hash, result, wanted, newest)
        return result

    def _run_stage(
        self, stage: StageConfig, parent: Path | None, done: Mapping[str, Path]
    ) -> dict[str, Any]:
        torch.compiler.reset()  # graphs of an earlier stage's model serve nobody
        began = time.perf_counter()
        ctx = self._context(stage, parent, done)
        with left_out.scope() as found:
            live = build_stage(ctx)
        self._say_left_out(stage, found.as_json())
        if isinstance(live, PolicyStage):
            world, row = dist.get_world_size(), live.longest_row()
            self.progress.message(arithmetic(self.run, stage, world, row))
        lineage = self._lineage(stage, live.data_hash, parent)
        loop = Loop(ctx, live, lineage, self.progress, self.gemm_rate(stage, ctx.device), self.gate)
        path = loop.run()
        counts = counted(checkpoint.read_meta(path))
        if words := too_many(counts, stage.max_skipped):
            self.logger.event(stage.name, stage.steps, "mostly_skipped", words, **counts)
        metrics = evaluate_all(ctx, live.engine, self.progress)
        result = {
            "name": stage.name,
            "kind": stage.kind,
            "steps": stage.steps,
            "layout": str(ctx.layout),
            "checkpoint": str(path.relative_to(self.run.directory)),
            "checkpoint_hash": manifest.read(path).digest,
            **dataclasses.asdict(lineage),
            "seconds": loop.seconds,
            "wall_seconds": time.perf_counter() - began,
            "tokens": loop.tokens,
            **counts,
            **loop.meter.total(),
            "figures": loop.figures,
            "metrics": metrics,
        }
        if dist.get_rank() == 0:
            write_result(self._result_path(stage), result)
        dist.barrier()
        del live, loop
        gc.collect()
        return result

    # --- jobs that train nothing ----------------------------------------------------------------

    def _job(
        self, config: JobConfig, parent: Path | None, done: Mapping[str, Path]
    ) -> dict[str, Any]:
        """The result of a job, which may be finished already."""
        path = self._result_path(config)
        result = read_result(path, JOB_KEYS)
        if result is not None:
            check_artifacts(self.run.directory, result)
            wanted = self._lineage(config, result["data_hash"], parent)
            check_hashes(config.name, "artifacts", result, wanted)
            self.progress.message(f"{config.name}: finished before, nothing to do")
        else:
            ctx = self._context(config, parent, done)
            job = build_job(ctx)
            lineage = self._lineage(config, job.data_hash, parent)
            work = JobRun(ctx, job, lineage, self.progress, self.gate)
            made = {"name": config.name, "kind": config.kind, **work.run()}
            result = made | dataclasses.asdict(lineage)
            if dist.get_rank() == 0:
                write_result(path, result)
            dist.barrier()
            work.remove_parts()
            del job, work
            gc.collect()
        for name, artifact in result["artifacts"].items():
            key = f"{config.name}.{name}"
            self.artifacts[key] = self.run.directory / artifact["path"]
            self.hashes[key] = artifact["xxh3_128"]
            self.rows[key] = artifact["rows"]
        return result

    def _context(
        self, config: JobConfig, parent: Path | None, done: Mapping[str, Path]
    ) -> StageContext:
        """Of a stage or job, with the paths of what earlier jobs have written for it."""
        for key, reader in artifacts_of(config):
            if reader.from_ not in self.artifacts:
                raise ConfigError(
                    f"stages.{config.name}.{'.'.join(map(str, key))}.from: {reader.from_} was not "
                    "written, as its stage was not run; name one that was, or remove the rule"
                )
            if not self.rows[reader.from_]:
                raise DataError(
                    f"stages.{config.name}.{'.'.join(map(str, key))}.from: {reader.from_} has no "
                    "rows, so there is nothing to read; ask for more or easier problems, or loosen "
                    "what its stage keeps, and give that stage another name to run it again"
                )
        adapters = {s.name: s.adapter for s in self.run.training}
        trained = next((name for name, path in done.items() if path == parent), "")
        return StageContext(
            self.run,
            resolved(config, self.artifacts),
            self.tokenizer,
            self.run.directory,
            self.logger,
            parent,
            dict(done),
            adapters.get(trained),
        )

    def _lineage(self, stage: JobConfig, data_hash: str, parent: Path | None) -> Lineage:
        hashes = self.hashes
        return lineage_of(self.run, stage, self.tokenizer.hash, data_hash, parent, hashes)

    def _newest(self, stage: StageConfig) -> Path | None:
        """A stage's newest checkpoint as rank 0 sees it: a shared disk may show others another."""
        found = checkpoint.latest(checkpoint_root(self.run.directory, stage.name))
        name: str | None = Ranks.of(None).share(None if found is None else str(found))
        return None if name is None else Path(name)

    def _say_left_out(self, stage: StageConfig, found: list[dict[str, Any]]) -> None:
        """Note the rows that no batch will have; every rank reads the same files."""
        if found:
            words = "; ".join(str(left_out.LeftOut(**one)) for one in found)
            self.logger.note(LEFT_OUT, words, stage.name, left_out=found)

    def _result_path(self, stage: JobConfig) -> Path:
        return self.run.directory / "stages" / stage.name / RESULT_FILE

    def gemm_rate(self, stage: StageConfig, device: torch.device) -> float:
        """The machine's GEMM rate (FLOP/s over all ranks, measured at once) for a stage's dtype."""
        name = stage.engine.precision
        if name not in self.gemm:
            dist.barrier()
            mine = self.rate(precision_of(name, device).compute, device)
            self.gemm[name] = of_all_ranks(mine, device)
        return self.gemm[name]


def of_all_ranks(rate: float, device: torch.device) -> float:
    """The sum of what each rank can do; a collective call."""
    total = torch.tensor(rate, dtype=torch.float64, device=device)
    return float(sum_over(total, dist.group.WORLD))


def evaluate_all(
    ctx: StageContext, engine: Engine, progress: Progress, step: int | None = None
) -> dict[str, Any]:
    """Every evaluation of the run on the engine's weights; flat metrics.

    Figures of a kind's first evaluation go by their plain names; those of further ones carry the
    evaluation's name in front, so that none stands for another. A model without a vocabulary's
    head has none: its stage validates it.
    """
    merged: dict[str, Any] = {}
    first = {e.kind: e.name for e in reversed(ctx.run.evaluations)}
    for config in evaluations_of(ctx.run, ctx.stage):
        began = time.perf_counter()
        progress.message(f"{ctx.stage.name}: evaluating {config.name}")
        result = run_evaluation(config, ctx, engine)
        at = ctx.stage.steps if step is None else step
        for kind, text in result.pop("events", []):
            ctx.logger.event(ctx.stage.name, at, kind, f"{config.name}: {text}")
            progress.message(f"{ctx.stage.name}: {config.name}: {text}")
        if first[config.kind] != config.name:
            result = {k if k == "samples" else f"{config.name}.{k}": v for k, v in result.items()}
        result[f"{config.name}_seconds"] = time.perf_counter() - began
        numbers = {k: v for k, v in result.items() if isinstance(v, (int, float))}
        ctx.logger.log(ctx.stage.name, at, numbers, "eval")
        samples = [*merged.get("samples", []), *result.pop("samples", [])]
        merged |= result | ({"samples": samples} if samples else {})
    return merged
