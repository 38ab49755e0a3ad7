"""What a stage asks of its engines, recorded once on one process, to be asked again elsewhere.

A stage talks to engines alone (design decision 8). So its calls, with their micro-batches and
losses, are all that a layout could change the answer to: recording them covers every stage without
knowing any. A stage that writes its own batches (it has a ``rollout_worker``) computes between its
calls too: advantages, returns, old log-probabilities. Of it the completions and their rewards are
recorded, and the stage itself runs again on the layout, told what was written.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import OptimizerConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, State
from shardwise.losses.contract import Loss
from shardwise.metrics.writers import MetricsLogger
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.layout import Layout
from shardwise.stages.base import ACTOR, StageContext
from shardwise.stages.registry import build_stage
from shardwise.stages.rollout_worker import Group
from shardwise.stages.run import prepare_tokenizer, with_vocabulary
from shardwise.verify.shrink import STEPS, shrink


@dataclasses.dataclass(frozen=True)
class Call:
    """One update of an engine: forward_backward and step."""

    engine: int
    step: int
    batches: list[MicroBatch]
    loss: Loss
    lr: float


@dataclasses.dataclass(frozen=True)
class Part:
    """One engine of a stage."""

    role: str
    model: DecoderConfig
    optimizer: OptimizerConfig | None


@dataclasses.dataclass
class Trace:
    """A stage's engines and calls, what it wrote in each step, and prompts that it answers."""

    run: RunConfig
    stage: str
    parts: list[Part] = dataclasses.field(default_factory=list)
    calls: list[Call] = dataclasses.field(default_factory=list)
    rollouts: list[list[Group]] = dataclasses.field(default_factory=list)
    prompts: list[list[int]] = dataclasses.field(default_factory=list)


class _Recorder:
    """An engine that notes what it is asked, and does it."""

    def __init__(self, inner: Any, number: int, trace: Trace) -> None:
        self.inner, self.number, self.trace = inner, number, trace
        self.step_number = 0
        self._open: tuple[list[MicroBatch], Loss] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def forward_backward(self, microbatches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        self._open = (copy.deepcopy(list(microbatches)), loss)
        found: dict[str, float] = self.inner.forward_backward(microbatches, loss)
        return found

    def step(self, lr: float) -> float:
        assert self._open is not None, "a stage that steps without gradients"
        batches, loss = self._open
        self.trace.calls.append(Call(self.number, self.step_number, batches, loss, lr))
        self._open = None
        return float(self.inner.step(lr))

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        found: list[Tensor] = self.inner.forward(microbatches, fn)
        return found

    def events(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = self.inner.events()
        return found

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        return list(self.inner.sum_over_data(values))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.inner.weights()

    def state_dict(self) -> State:
        state: State = self.inner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        self.inner.load_state_dict(state)

    def broadcast(self, value: Any) -> Any:
        return self.inner.broadcast(value)


@dataclasses.dataclass(frozen=True)
class FreshContext(StageContext):
    """A stage of which all models start from their initial weights."""

    def initial_checkpoint(self, role: str) -> Path | None:
        """Nowhere."""
        return None

    def model_of(self, role: str) -> DecoderConfig:
        """The run's, with the role's head."""
        assert isinstance(self.run.model, DecoderConfig)
        return self.fitted(self.run.model, role)


@dataclasses.dataclass(frozen=True)
class _Context(FreshContext):
    trace: Trace | None = None

    def engine(self, optimizer: OptimizerConfig | None, role: str = ACTOR) -> Engine:
        assert self.trace is not None
        number = len(self.trace.parts)
        self.trace.parts.append(Part(role, self.model_of(role), optimizer))
        return _Recorder(super().engine(optimizer, role), number, self.trace)


def record(recipe: dict[str, Any], stage_name: str, layouts: Sequence[Layout]) -> Trace:
    """Run `shrink.STEPS` steps of one stage, made small, on this process alone; note its calls."""
    with tempfile.TemporaryDirectory(prefix="shardwise-verify-") as folder:
        directory = Path(folder)
        small = shrink(load_config(recipe).config, stage_name, layouts, directory)
        run = load_config(small | {"run_dir": folder}).config
        tokenizer = prepare_tokenizer(run, directory, 0)
        run = with_vocabulary(run, tokenizer)
        [stage] = [s for s in run.stages if s.name == stage_name]
        trace = Trace(run, stage_name)
        logger = MetricsLogger(directory, run.logging, run.name, {}, rank=0)
        ctx = _Context(run, stage, tokenizer, directory, logger, None, trace=trace)
        live: Any = build_stage(ctx)
        if hasattr(live, "rollout_worker"):
            live.rollout_worker = _RecordingRolloutWorker(live.rollout_worker, trace)
        for step in range(STEPS):
            for engine in _recorders(live):
                engine.step_number = step
            live.train_step(step, stage.optimizer.lr)
        logger.close()
        if hasattr(stage, "sampling"):
            texts = ("Count: ", "a b a", "1 + 1 =")
            trace.prompts = [tokenizer.encode(t)[:8] for t in texts]
    if trace.rollouts:
        trace.calls = []  # the stage makes them again
    else:
        _leave_one_token(trace.calls[-1].batches)
    return trace


class _RecordingRolloutWorker:
    """Keeps what was written before a stage adds anything to it."""

    def __init__(self, inner: Any, trace: Trace) -> None:
        self.inner, self.trace = inner, trace

    def sync(self, engine: Engine) -> None:
        self.inner.sync(engine)

    def rollout(self, *args: Any, **kwargs: Any) -> list[Group]:
        groups: list[Group] = self.inner.rollout(*args, **kwargs)
        self.trace.rollouts.append(copy.deepcopy(groups))
        return groups


def _recorders(live: Any) -> list[_Recorder]:
    return [value for value in vars(live).values() if isinstance(value, _Recorder)]


def _leave_one_token(batches: list[MicroBatch]) -> None:
    """The last update of a supervised stage learns from a single token of the global batch.

    Of rankings, from a single one: a token of it says nothing.
    """
    seen = False
    for i, batch in enumerate(batches):
        mask_BT = torch.zeros_like(batch.loss_mask_BT)
        if not seen and bool(batch.loss_mask_BT.any()):
            seen = True
            row, column = batch.loss_mask_BT.nonzero()[-1].tolist()
            if batch.extras:
                mask_BT[row] = batch.loss_mask_BT[row]
            else:
                mask_BT[row, column] = True
        batches[i] = dataclasses.replace(batch, loss_mask_BT=mask_BT)
