"""One stage of a small recipe, run on a layout by the loop that trains, and noted; in a rank.

The whole path: some steps, a save, everything built anew, a resume on the same layout, the next
step; a resume from what another layout saved, the same step; the weights to what serves rollouts,
and its tokens. Or the updates alone, without saving and serving.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardwise import checkpoint
from shardwise.checkpoint.writer import Writer
from shardwise.config.run import RunConfig
from shardwise.config.schema import EngineConfig, StageConfig
from shardwise.data.tokenizer import load_tokenizer
from shardwise.engines.base import Engine
from shardwise.engines.registry import as_kind
from shardwise.errors import CheckFailed, CheckpointError, UserError
from shardwise.metrics.progress import Progress
from shardwise.ops import rng
from shardwise.ops.flat_shard import FlatShard
from shardwise.ops.local_shards import local_shards
from shardwise.parallel.full_tensor import local_tensor
from shardwise.parallel.mesh import pick_device
from shardwise.precision.policy import PRECISIONS
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Request
from shardwise.rollout.sharded import group_mesh
from shardwise.stages.base import checkpoint_root, evaluations_of
from shardwise.stages.lineage import Lineage
from shardwise.stages.loop import Loop, stage_state
from shardwise.stages.pipeline import Pipeline, evaluate_all
from shardwise.stages.registry import build_stage
from shardwise.stages.rollouts import rollout_file
from shardwise.verify.logger import WatchedLogger
from shardwise.verify.notes import Noted, Notes, Reference
from shardwise.verify.roles import parse, with_engines, with_layouts
from shardwise.verify.roundings import Lines
from shardwise.verify.shrink import STEPS
from shardwise.verify.thresholds import (
    OF_BOTH,
    OF_CHECKPOINTS,
    OF_MODELS,
    OF_UPDATES,
    lowered,
)
from shardwise.verify.watch import (
    External,
    WatchedContext,
    WatchedEngine,
    numbers_of,
)

SAVED_AFTER = 2  # steps; `STEPS` follow
NEW_TOKENS = 6
# Completions of each of the prompts, which are the beginnings of one; and how many are in flight:
# fewer than there are. Each of so many words ends one, so that others take its place.
PROMPT, SAMPLES, SLOTS, ENDS = "Count: a", 3, 16, 3
GEMM = 1e9  # FLOP/s of a machine, with which figures of speed are compared
SAMPLINGS = {
    "greedy": Sampling(greedy=True, max_new_tokens=NEW_TOKENS),
    "sampled": Sampling(temperature=1.0, max_new_tokens=NEW_TOKENS),
}
RESUMED = "in a resume from another layout's checkpoint"


@dataclasses.dataclass(frozen=True)
class Task:
    """What every rank of a layout is asked to run.

    Without a ``reference`` the values themselves are kept, in ``record``. ``given``: what comes
    from outside (None: it is computed, and returned). ``saved``: where to leave what others resume
    from; ``other``: where another left it (``resumes_alone``: nothing else is run). ``starts``:
    where the oracle writes what stages may start from. ``probe``: an update of which modules are
    noted, too. ``domains``, ``split``, ``skip``: of the oracle, see the plain engine's config.
    """

    run: RunConfig
    stage: str
    layout: str
    precision: str
    folder: Path  # the small recipe's: tokenizer and tokenised data
    directory: Path  # this run's own
    device: str = "cpu"
    oracle: bool = False  # by the engine that shares nothing with the native one
    compiled: bool = False
    whole: bool = False
    reference: Path | None = None
    record: Path | None = None
    saved: Path | None = None
    starts: Path | None = None
    given: External | None = None
    other: Path | None = None
    domains: str | None = None
    resumes_alone: bool = False
    probe: str = ""
    split: str = "whole"
    skip: dict[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Walked:
    """One rank's figures. ``resumed``: of the resume from another layout's checkpoint."""

    found: dict[str, list[Noted]]
    dealt: dict[str, tuple[int, list[int]]]
    scales: dict[str, torch.Tensor]
    problems: list[str]
    skipped: dict[str, list[int]]
    volumes: list[dict[str, Any]]
    asked: External
    touched: dict[str, str]  # the collective that a value came out of last
    dtypes: dict[str, dict[tuple[str, str], str]]  # by role and quantity: what was not declared
    resumed: dict[str, list[Noted]] | None = None
    lines: Lines = dataclasses.field(default_factory=dict)  # where 16 bits were rounded to


class _StoppedError(Exception):
    """The walk ends here, as if the process had."""


class _HeldWriter(Writer):
    """Writes tensors once it `may`, however long that takes."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def shard(self, *args: Any) -> Any:
        """See `Writer`."""
        self.may.wait()
        return super().shard(*args)


class _WatchedLoop(Loop):
    """The loop of a run, which ends after a step, and saves where that is part of the path.

    A step takes a second: figures of speed are figures of counts.
    """

    def __init__(
        self, ctx: WatchedContext, stop_after: int, saves: bool, kept: Path | None
    ) -> None:
        live = build_stage(ctx)
        lineage = Lineage("the same recipe", live.data_hash, "")
        progress, share = Progress([], rank=1), GEMM / dist.get_world_size()
        pipeline = Pipeline(ctx.run, ctx.tokenizer, ctx.logger, progress, rate=lambda *_: share)
        gemm = pipeline.gemm_rate(ctx.stage, ctx.device)
        super().__init__(ctx, live, lineage, progress, gemm)
        self.meter.keep(1)  # what a resume forgets is in no window
        self.notes, self.stop_after, self.saves, self.kept = ctx.notes, stop_after, saves, kept
        self.resumed = ctx.resumed
        if self.saver and stop_after < STEPS:
            self.saver.writer = self.held = _HeldWriter()

    def _resume(self) -> int | None:
        start = super()._resume()
        if start is not None:
            self._note_state()
            if dist.get_world_size() == 1:
                self._open_whole()
        return start

    def _open_whole(self) -> None:
        """What one process loaded in place is what opens whole, as for a conversion.

        And in part, as another cut would ask for: from within one of the parts that were saved.
        """
        held = stage_state(self.stage).tensors
        wholes = dict(checkpoint.read_tensors(self.root))
        ends = {
            name: FlatShard(whole.new_empty(n - n * 5 // 6), whole.shape, n * 5 // 6)
            for name, whole in wholes.items()
            if (n := whole.numel()) > 1
        }
        checkpoint.load(self.root, ends, partial=True)
        for name, whole in wholes.items():
            own = local_tensor(held[name]).cpu().view(whole.shape)
            if not torch.equal(whole.nan_to_num(), own.nan_to_num()):
                self.notes.problems.append(f"{name} opens whole as it was not saved")
            end = ends.get(name)
            if end is not None and not torch.equal(
                whole.view(-1)[end.start :].nan_to_num(), end.local.nan_to_num()
            ):
                self.notes.problems.append(f"{name} opens in part as it was not saved")

    def _note_state(self) -> None:
        """What a checkpoint brings back, as it is behind a resume, or goes on without one."""
        for engine in (self.stage.engine, *self.stage.others().values()):
            assert isinstance(engine, WatchedEngine)
            engine.note_tensors("resumed weight", "weights")
            for kind in engine.optimizer_states():
                engine.note_tensors("resumed moment", kind, f" {kind}")
        state = stage_state(self.stage)
        for name, tensor in state.tensors.items():
            if name.endswith(".step"):
                self.notes.note_tensor("resumed number", name, tensor)
        for name, number in _numbers(state.meta):
            self.notes.note("resumed number", name, number)

    def _train_step(self, step: int) -> dict[str, float]:
        self.notes.step = step + 1
        return super()._train_step(step)

    def _after_step(
        self, done: int, metrics: dict[str, float], elapsed: float, steady: bool
    ) -> None:
        super()._after_step(done, metrics, 1.0, True)
        totals = {"tokens": self.tokens, "seconds": self.seconds} | self.meter.total()
        for name, value in totals.items():
            self.notes.note("logged", f"step {done} in all {name}", value)
        for name, number in _numbers(self.stage.state_dict()):  # before one step undoes another
            self.notes.note("state", f"step {done} {name}", number)
        self._note_rollout(done)
        if done == SAVED_AFTER and self.kept is not None and not self.resumed:
            if self.saver:
                self.saver.wait()
            self.notes.mark()
            if self.stop_after > SAVED_AFTER:
                self._note_state()
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.copytree(self.ctx.directory, self.kept)
        if done == self.stop_after:
            if self.saver:
                self.saver.close()
            raise _StoppedError

    def _note_rollout(self, done: int) -> None:
        """What a step stored of its rollout, key by key; a policy's checksum is a layout's own."""
        path = rollout_file(self.ctx.directory, self.config.name, done - 1)
        if not self.ctx.is_main or not path.exists():
            return
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        for key in dict.fromkeys(itertools.chain(*records)):
            found = [record.get(key) for record in records]
            value = len(set(found)) if key == "policy" else numbers_of(found)
            self.notes.note("stored rollout", f"step {done} {key}", value)

    def _save(self, done: int, validated: dict[str, float]) -> None:
        if not self.saves:
            return
        super()._save(done, validated)
        if self.saver and done == self.stop_after < STEPS:
            # The next update comes before a thread has written: nothing of it may be saved.
            for name, tensor in stage_state(self.stage).tensors.items():
                for shard in local_shards(name, tensor):
                    shard.view.add_(1)
            self.held.may.set()


def _numbers(meta: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a checkpoint's JSON that a precision does not add: scales are compared."""
    if isinstance(meta, dict):
        for key, value in meta.items():
            if key not in ("fp8", "loss_scale"):
                yield from _numbers(value, f"{name} {key}".strip())
    elif isinstance(meta, (int, float)):
        yield name, float(meta)


@lowered(OF_BOTH)
def walk(task: Task) -> Walked:
    """Every rank of the layout calls this."""
    torch.manual_seed(0)
    device = pick_device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    stage = stage_of(task)
    with lowered(OF_MODELS if stage.adapter is None else {}):
        return _walk(task, stage)


def _walk(task: Task, stage: StageConfig) -> Walked:
    reference = None if task.reference is None else Reference(task.reference)
    notes = Notes(reference)
    notes.probe = task.probe
    asked: External = {}
    if not task.resumes_alone:
        with lowered(*([] if task.oracle else [OF_CHECKPOINTS])):
            _walk_through(task, stage, notes, asked)
    walked = Walked(
        notes.found,
        notes.dealt,
        notes.scales,
        notes.problems,
        notes.skipped,
        notes.volumes,
        asked,
        notes.touched,
        {role: check.problems() for role, check in notes.dtypes.items()},
        lines=notes.lines,
    )
    if task.other is not None:
        again = notes.at_mark()
        directory = task.directory.with_name(task.directory.name + "-resumed")
        if dist.get_rank() == 0:
            shutil.copytree(task.other, directory)
        dist.barrier()
        if not task.oracle:
            stage = with_layouts(stage, task.layout, compile="auto")
        try:
            with lowered(*([] if task.oracle else [OF_CHECKPOINTS, OF_UPDATES])):
                run_stage(task, stage, again, asked, directory, STEPS, resumed=True)
        except CheckpointError as error:  # all ranks agree on that; the rest is worth comparing
            again.problems.append(" ".join(str(error).splitlines()[:2]))
        walked.resumed = again.found
        walked.problems += [f"{RESUMED}: {p}" for p in again.problems]
    return walked


def _walk_through(task: Task, stage: StageConfig, notes: Notes, asked: External) -> None:
    """All steps, broken off and resumed in between, and what is served at the end."""
    # The oracle is not broken off: what is lost at a resume would be lost on both sides.
    first = SAVED_AFTER if task.whole and not task.oracle else STEPS
    loop = run_stage(task, stage, notes, asked, task.directory, first)
    if first < STEPS:
        del loop
        before = len(notes.problems)
        loop = run_stage(task, stage, notes, asked, task.directory, STEPS, resumed=True)
        notes.problems[before:] = [f"after a resume, {p}" for p in notes.problems[before:]]
    notes.marked["ended"] = len(notes.values)
    if stage.on_policy or (task.whole and stage.head == "vocabulary"):
        _generate(task, loop.stage.engine, stage, notes)
    if task.whole and task.precision == "fp64":
        _evaluate(loop, notes)
    if task.whole:
        for engine in (loop.stage.engine, *loop.stage.others().values()):
            assert isinstance(engine, WatchedEngine)
            engine.end()
    if task.record is not None:
        notes.save(task.record)


def stage_of(task: Task) -> StageConfig:
    """The stage as the task's layout, precision and engine have it."""
    [stage] = [s for s in task.run.training if s.name == task.stage]
    # Here, the library of a GPU is whatever runs in its place.
    fp8 = stage.engine.fp8 and stage.engine.fp8.model_copy(update={"backend": "auto"})
    updates = {
        "precision": task.precision,
        "compile": task.compiled,
        "device": task.device,
        "fp8": fp8,
    }
    every = SAVED_AFTER if task.whole else 0
    checkpoint = stage.checkpoint.model_copy(update={"every": every})
    stage = stage.model_copy(update={"checkpoint": checkpoint})
    stage = with_layouts(stage, task.layout, **updates)
    return _plainly(stage, task) if task.oracle else stage


def _plainly(stage: StageConfig, task: Task) -> StageConfig:
    """The stage's engines, and those of its roles, of kind ``plain``."""
    domains = {p.role: p.layout for p in parse(task.domains)} if task.domains else {}

    def plain(engine: EngineConfig, role: str) -> EngineConfig:
        own: Any = {
            "split": task.split,
            "domains": domains.get(role, domains.get("")),
            "skip": task.skip.get(role, []),
        }
        return as_kind(engine, "plain", **own)

    return with_engines(stage, plain)


def run_stage(
    task: Task,
    stage: StageConfig,
    notes: Notes,
    asked: External,
    directory: Path,
    stop_after: int,
    resumed: bool = False,
    watched: Callable[..., WatchedContext] = WatchedContext,
) -> Loop:
    """Steps of the stage up to ``stop_after`` in a context of ``watched``; returns its loop."""
    ctx = watched(
        task.run,
        stage,
        load_tokenizer(task.run.tokenizer),
        directory,
        WatchedLogger(notes, stage),
        None,
        notes=notes,
        given=task.given,
        asked=asked,
        data_folder=task.folder / "cache",
        resumed=resumed,
        loads=task.whole and not resumed,
        starts=task.starts,
        writes=task.oracle,
        asks_again=task.whole and task.precision == "fp64",
    )
    loop = _WatchedLoop(ctx, stop_after, task.whole, task.saved if task.whole else None)
    try:
        loop.run()
    except _StoppedError:
        return loop
    raise CheckFailed(
        f"nothing was left to do after a resume: {checkpoint_root(directory, stage.name)}"
    )


def _evaluate(loop: Loop, notes: Notes) -> None:
    """The recipe's evaluations of what the stage has become, on every rank that has a figure.

    Answers are decoded in fp32, whatever a layout trains in, and rounding changes some: in fp64.
    """
    ctx, notes.step = loop.ctx, STEPS + 1
    for config in evaluations_of(ctx.run, ctx.stage):
        done = f"evaluation/{config.name} done"
        if notes.reference and done not in notes.reference.values:
            return
        alone = dataclasses.replace(ctx, run=ctx.run.model_copy(update={"evaluations": [config]}))
        try:
            found = evaluate_all(alone, loop.stage.engine, loop.progress)
        except UserError:  # what is too long for the small model's rows, say
            if notes.reference:
                raise
            return
        for name, value in found.items():
            if isinstance(value, (int, float)) and not name.endswith("_seconds"):
                notes.note("evaluation", f"{config.name} {name}", value)
        for number, sample in enumerate(found.get("samples", [])):
            text = str(sample["completion"]).encode()
            notes.note("evaluation", f"{config.name} sample {number}", list(text))
        notes.note("evaluation", f"{config.name} done", 1.0)


def _generate(task: Task, engine: Engine, stage: StageConfig, notes: Notes) -> None:
    """Completions, greedy and sampled, from the weights that stream out of the layout.

    By what serves rollouts, all at once; for the oracle by the model itself, one at a time.
    Raises CheckFailed if what serves is found to compute otherwise than the model.
    """
    dtype = PRECISIONS[task.precision].compute
    served = torch.float32 if dtype == torch.float64 else dtype
    device = pick_device(task.device)
    config = engine.adapter_config
    beside = None if config is None or config.merges else config
    mesh = group_mesh(getattr(stage, "rollout", RolloutConfig()).tp, device)
    accelerate = not task.oracle
    generator = Generator(
        task.run.model, served, device, SLOTS, accelerate=accelerate, adapter=beside, mesh=mesh
    )
    generator.update_weights(engine.weights())
    if generator.mismatch:
        raise CheckFailed(generator.mismatch)
    tokens = load_tokenizer(task.run.tokenizer).encode(PROMPT)
    prompts = [tokens[:size] for size in range(len(tokens), 0, -1)]
    together = [Request(i, p, SAMPLES) for i, p in enumerate(prompts)]
    alone = [
        [Request(r.prompt_id, r.prompt_tokens, 1, s)] for r in together for s in range(SAMPLES)
    ]
    ends = range(0, task.run.model.vocab_size, ENDS)
    for name, sampling in SAMPLINGS.items():
        stopping, key = sampling.stopping_at(ends), rng.key(0, "verify")
        calls = alone if task.oracle else [together]
        done = [c for some in calls for c in generator.generate(some, stopping, key)]
        ids = list(itertools.chain(*(c.token_ids for c in done)))
        logprobs = list(itertools.chain(*(c.logprobs for c in done)))
        notes.note("generated tokens", name, ids)
        notes.note("generated logprobs", name, torch.tensor(logprobs, dtype=torch.float64))
