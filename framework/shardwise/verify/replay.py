"""A trace replayed on a layout, in a rank process: everything that can be compared, by name."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.checkpoint.layout import local_shards
from shardwise.checkpoint.regions import Region
from shardwise.config.schema import OptimizerConfig
from shardwise.data.batch import MicroBatch, join
from shardwise.data.tokenizer import load_tokenizer
from shardwise.engines.base import Engine
from shardwise.engines.native import NativeEngine
from shardwise.engines.placed import PlacedEngine
from shardwise.errors import CheckFailed
from shardwise.losses.contract import Loss
from shardwise.metrics.writers import MetricsLogger
from shardwise.ops import comm, rng
from shardwise.ops.fp8_linear import Seen, listening
from shardwise.precision.policy import PRECISIONS
from shardwise.rewards import RewardConfig
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.scheduler import Request
from shardwise.rollout.weights import digest
from shardwise.stages.base import ACTOR, StageContext, role_layout, role_of
from shardwise.stages.registry import build_stage
from shardwise.stages.rollout_worker import Group
from shardwise.verify.roles import with_layouts
from shardwise.verify.trace import Call, FreshContext, Trace

NEW_TOKENS = 6


# The regions of a parameter, or of what belongs to it, that one rank holds.
Parts = list[tuple[Region, Tensor]]


@dataclasses.dataclass
class Replayed:
    """One rank's results. What all ranks know comes from rank 0 alone; others send its digest."""

    values: dict[str, Tensor | Parts]
    scales: dict[str, Tensor]  # what this rank scaled by, in FP8; other ranks hold other parts
    digests: dict[str, str]  # of whole values, and of each region of the others
    volumes: list[dict[str, Any]]  # communication of the first update


def replay(
    trace: Trace,
    layout: str,
    precision: str,
    compiled: bool = False,
    domains: str | None = None,
    plain: bool = False,
) -> Replayed:
    """Every rank of the layout calls this; ``precision`` replaces the recipe's.

    ``domains``: with FP8, whose scaling domains one process emulates. ``plain``: the model itself
    generates, to be compared with what serves rollouts.
    """
    torch.manual_seed(0)
    [stage] = [s for s in trace.run.stages if s.name == trace.stage]
    # Here, the library of a GPU is whatever runs in its place.
    changes = {"domains": domains, "backend": "auto"}
    fp8 = stage.engine.fp8 and stage.engine.fp8.model_copy(update=changes)
    updates = {"precision": precision, "compile": compiled, "device": "cpu", "fp8": fp8}
    stage = with_layouts(stage, layout, **updates)
    with tempfile.TemporaryDirectory(prefix="shardwise-replay-") as folder:
        logger = MetricsLogger(Path(folder), rank=1)  # no rank writes metrics
        tokenizer = load_tokenizer(trace.run.tokenizer)
        ctx = FreshContext(trace.run, stage, tokenizer, Path(folder), logger, None)
        again = _StageAgain(trace, ctx) if trace.rollouts else _Calls(trace, ctx)
        again.note_weights("initial")
        again.run()
        again.note_weights("weight")
        again.note_moments()
        if trace.prompts:
            again.generate(PRECISIONS[precision].compute, plain)
    digests, values = {}, {}
    for name, value in again.values.items():
        if isinstance(value, Tensor):
            digests[name] = digest(value)
        else:
            digests |= {f"{name} at {list(b.offset)}": digest(part) for b, part in value}
        if dist.get_rank() == 0 or not isinstance(value, Tensor):
            values[name] = value
    return Replayed(values, again.scales, digests, again.volumes or [])


class _Notes:
    """Notes values in the order in which they come about: what differs first is nearest the bug.

    Kinds: initial, what a stage reads and makes of its rollouts (logprobs, values, advantages,
    returns), loss, metric, sentinel, gradient, clip norm, weight, moment, generated tokens,
    generated logprobs. Kinds of scales: amax, scale, history.
    """

    def __init__(self, trace: Trace, ctx: StageContext) -> None:
        self.trace, self.ctx = trace, ctx
        self.engines: list[Engine] = []
        self.values: dict[str, Tensor | Parts] = {}
        self.scales: dict[str, Tensor] = {}
        self.volumes: list[dict[str, Any]] | None = None
        self.seen: set[int] = set()  # engines whose first gradients are noted

    def note(self, kind: str, name: str, value: Tensor | float) -> None:
        self.values[f"{kind}/{name}"] = torch.as_tensor(value, dtype=torch.float64).clone()

    def note_metric(self, where: str, name: str, value: float) -> None:
        if name == "loss":
            self.note("loss", where, value)
        else:
            self.note("sentinel" if name.startswith("fp8") else "metric", f"{where} {name}", value)

    def note_parts(self, kind: str, number: int, what: str, ending: str = "") -> None:
        """What this rank holds of an engine's weights, gradients or moments (`held`)."""
        inner = inner_of(self.engines[number])
        for name, value in () if inner is None else inner.held(what):
            parts = [
                (p.region, p.view.to(torch.float64, copy=True)) for p in local_shards(name, value)
            ]
            self.values[f"{kind}/{self.label(number)}{name}{ending}"] = parts

    def note_weights(self, kind: str) -> None:
        for number in range(len(self.engines)):
            self.note_parts(kind, number, "weights")

    def note_moments(self) -> None:
        for number, engine in enumerate(self.engines):
            inner = inner_of(engine)
            optimizer = None if inner is None else inner.optimizer
            states = sorted(next(iter(optimizer.state.values()))) if optimizer is not None else []
            for state in states:
                if state != "step":
                    self.note_parts("moment", number, state, f" {state}")

    def label(self, number: int) -> str:
        return f"{self.trace.parts[number].role} " if len(self.engines) > 1 else ""

    def note_gradients(self, number: int) -> None:
        """Of an engine's first update."""
        if number not in self.seen:
            self.seen.add(number)
            self.note_parts("gradient", number, "grads")

    def run(self) -> None:
        """The whole trace."""
        raise NotImplementedError

    def noting_scales(self, where: str, first: int) -> contextlib.AbstractContextManager[None]:
        """Note what every backward pass inside scales by; ``first``: number of a micro-batch."""
        passes: Counter[tuple[str, int]] = Counter()

        def note(seen: Seen) -> None:
            key = (seen.site.path, seen.site.part)
            number = first + passes[key]
            passes[key] += 1
            name = f"{where} {key[0]} micro-batch {number + 1} part {key[1]}"
            self.scales[f"amax/{name}"] = seen.amax_3.clone()
            for operand, scale_inv in seen.scale_inv.items():
                self.scales[f"scale/{name} {operand}"] = scale_inv.float().clone()

        return listening(note)

    def note_history(self, number: int, where: str) -> None:
        """What an engine's scales will follow from."""
        inner = inner_of(self.engines[number])
        for name, value in inner.fp8.tensors() if inner is not None and inner.fp8 else ():
            self.scales[f"history/{where} {name}"] = value.clone()

    def generate(self, dtype: torch.dtype, plain: bool) -> None:
        """Greedy completions from the weights that stream out of the layout.

        By what serves rollouts, unless ``plain``. Raises CheckFailed if that is found to compute
        otherwise than the model.
        """
        served = torch.float32 if dtype == torch.float64 else dtype
        generator = Generator(self.trace.run.model, served, accelerate=not plain)
        generator.load(self.engines[0].weights())
        if generator.mismatch:
            raise CheckFailed(generator.mismatch)
        requests = [Request(i, p, 1) for i, p in enumerate(self.trace.prompts)]
        sampling = Sampling(greedy=True, max_new_tokens=NEW_TOKENS)
        done = generator.generate(requests, sampling, rng.key(0, "verify"))
        ids = list(itertools.chain(*(c.token_ids for c in done)))
        logprobs = list(itertools.chain(*(c.logprobs for c in done)))
        self.note("generated tokens", "greedy", torch.tensor(ids))
        self.note("generated logprobs", "greedy", torch.tensor(logprobs))


class _Calls(_Notes):
    """A supervised stage: its recorded updates."""

    def __init__(self, trace: Trace, ctx: StageContext) -> None:
        super().__init__(trace, ctx)
        self.engines = [ctx.engine(part.optimizer, part.role) for part in trace.parts]

    def run(self) -> None:
        """All calls."""
        for number, call in enumerate(self.trace.calls):
            self.call(number, call)

    def call(self, number: int, call: Call) -> None:
        """One update, in this layout's micro-batches."""
        engine = inner_of(self.engines[call.engine])
        assert engine is not None
        where = f"{self.label(call.engine)}call {number + 1}"
        share = len(call.batches) // engine.data_size
        mine = call.batches[engine.data_rank * share : (engine.data_rank + 1) * share]
        same_size = len({b.num_tokens for b in call.batches}) == 1
        # A micro-batch is a scaling domain of its own.
        if engine.mesh.layout.pp == 1 and same_size and engine.fp8 is None:
            # A layout without a pipeline computes few and large micro-batches faster; how many
            # there are may change nothing (design decision 2).
            half = -(-len(mine) // 2)
            mine = [join(mine[:half]), join(mine[half:])] if len(mine) > 1 else mine
        with comm.tally() as tally, self.noting_scales(where, engine.data_rank * share):
            metrics = engine.forward_backward(mine, call.loss)
        for name, value in metrics.items():
            self.note_metric(where, name, value)
        if self.volumes is None:
            self.volumes = tally.rows()
            self.note_gradients(call.engine)
        self.note_history(call.engine, where)
        self.note("clip norm", where, engine.step(call.lr))


class _Watched:
    """An engine whose updates are noted."""

    def __init__(self, inner: Engine, number: int, notes: _StageAgain) -> None:
        self.inner, self.number, self.notes = inner, number, notes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward_backward(self, microbatches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        notes = self.notes
        notes.updates += 1
        where = f"{notes.label(self.number)}update {notes.updates}"
        first = max(self.inner.data_rank, 0) * len(microbatches)
        with comm.tally() as tally, notes.noting_scales(where, first):
            metrics = self.inner.forward_backward(microbatches, loss)
        if notes.volumes is None:
            notes.volumes = tally.rows()
        for name, value in self.inner.broadcast(metrics).items():
            notes.note_metric(where, name, value)
        notes.note_gradients(self.number)
        notes.note_history(self.number, where)
        return metrics

    def step(self, lr: float) -> float:
        norm = self.inner.step(lr)
        where = f"{self.notes.label(self.number)}update {self.notes.updates}"
        self.notes.note("clip norm", where, self.inner.broadcast(norm))
        return norm


class _StageAgain(_Notes):
    """A stage that writes its own batches: it runs again, told what was written."""

    def __init__(self, trace: Trace, ctx: StageContext) -> None:
        super().__init__(trace, ctx)
        self.updates = 0
        self.step = 0
        whole = role_layout(role_of(ctx.stage, ACTOR), dist.get_world_size())
        batch = ctx.stage.batch
        # A micro-batch is a scaling domain of its own.
        if whole.pp == 1 and dist.get_world_size() > 1 and ctx.stage.engine.fp8 is None:
            # Fewer and larger micro-batches than one process has: that may change nothing.
            batch = batch.model_copy(update={"micro_batch": 2 * batch.micro_batch})
        # Rewards come from the trace too.
        stage = ctx.stage.model_copy(update={"reward": RewardConfig(), "batch": batch})
        context = _WatchingContext(
            ctx.run, stage, ctx.tokenizer, ctx.directory, ctx.logger, None, notes=self
        )
        live: Any = build_stage(context)
        live.rollout_worker, live.observe = self, self.observe
        self.live = live

    def run(self) -> None:
        """As many steps as were recorded."""
        for step in range(len(self.trace.rollouts)):
            self.live.train_step(step, self.ctx.stage.optimizer.lr)

    def sync(self, engine: Engine) -> None:
        """What a rollout worker does; nothing is written here."""

    def rollout(self, *args: Any, **kwargs: Any) -> list[Group]:
        """What was written in this step."""
        self.step += 1
        return copy.deepcopy(self.trace.rollouts[self.step - 1])

    def observe(self, groups: list[Group]) -> None:
        """What the stage has read and made of it."""
        for name in groups[0].per_token:
            found = [v for g in groups for v in g.per_token[name]]
            if any(v is None for v in found):
                continue
            flat = np.concatenate([np.atleast_1d(np.asarray(v, dtype=float)) for v in found])
            self.note(name.removesuffix("_BT"), f"step {self.step}", torch.from_numpy(flat))


@dataclasses.dataclass(frozen=True)
class _WatchingContext(FreshContext):
    notes: _StageAgain | None = None

    def engine(self, optimizer: OptimizerConfig | None, role: str = ACTOR) -> Engine:
        assert self.notes is not None
        engine = super().engine(optimizer, role)
        self.notes.engines.append(engine)
        return _Watched(engine, len(self.notes.engines) - 1, self.notes)


def inner_of(engine: Engine) -> NativeEngine | None:
    """What computes on this rank; None where the engine is elsewhere."""
    inner: Any = engine.inner if isinstance(engine, PlacedEngine) else engine
    assert inner is None or isinstance(inner, NativeEngine)
    return inner
