"""What a stage asks of its engines, recorded once on one process, to be asked again elsewhere.

A stage talks to engines alone (design decision 8). So its calls, with their micro-batches and
losses, are all that a layout could change the answer to: recording them covers every stage,
rollouts and rewards included, without knowing any.
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
from shardwise.config.schema import OptimizerConfig, RunConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, State
from shardwise.losses.contract import Loss
from shardwise.metrics.writers import MetricsLogger
from shardwise.parallel.layout import Layout
from shardwise.stages.base import StageContext, stage_mesh
from shardwise.stages.registry import STAGES
from shardwise.stages.run import prepare_tokenizer, with_vocabulary
from shardwise.verify.shrink import STEPS, shrink


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an engine: ``update`` (forward_backward and step) or ``forward``."""

    kind: str
    engine: int
    step: int
    batches: list[MicroBatch]
    loss: Loss | None = None
    lr: float = 0.0


@dataclasses.dataclass
class Tape:
    """A stage's calls, the engines that it made, and prompts that it had answered."""

    run: RunConfig
    stage: str
    optimizers: list[OptimizerConfig | None]
    calls: list[Call]
    prompts: list[list[int]]


class _Recorder:
    """An engine that notes what it is asked, and does it."""

    def __init__(self, inner: Any, number: int, tape: Tape) -> None:
        self.inner, self.number, self.tape = inner, number, tape
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
        call = Call("update", self.number, self.step_number, batches, loss, lr)
        self.tape.calls.append(call)
        self._open = None
        return float(self.inner.step(lr))

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        batches = copy.deepcopy(list(microbatches))
        self.tape.calls.append(Call("forward", self.number, self.step_number, batches))
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


@dataclasses.dataclass(frozen=True)
class _Context(StageContext):
    tape: Tape | None = None

    def engine(self, optimizer: OptimizerConfig | None) -> Engine:
        assert self.tape is not None
        number = len(self.tape.optimizers)
        self.tape.optimizers.append(optimizer)
        return _Recorder(super().engine(optimizer), number, self.tape)


def record(recipe: dict[str, Any], stage_name: str, layouts: Sequence[Layout]) -> Tape:
    """Run `shrink.STEPS` steps of one stage, made small, on this process alone; note its calls."""
    with tempfile.TemporaryDirectory(prefix="shardwise-verify-") as folder:
        directory = Path(folder)
        small = shrink(load_config(recipe).config, stage_name, layouts, directory)
        run = load_config(small | {"run_dir": folder}).config
        tokenizer = prepare_tokenizer(run, directory, 0)
        run = with_vocabulary(run, tokenizer)
        [stage] = [s for s in run.stages if s.name == stage_name]
        tape = Tape(run, stage_name, [], [], [])
        logger = MetricsLogger(directory, run.logging, run.name, {}, rank=0)
        mesh = stage_mesh(stage.engine, 1)
        ctx = _Context(run, stage, tokenizer, directory, mesh, logger, None, tape)
        live = STAGES[stage.kind](ctx)
        for step in range(STEPS):
            for engine in _recorders(live):
                engine.step_number = step
            live.train_step(step, stage.optimizer.lr)
        logger.close()
        if hasattr(stage, "sampling"):
            texts = ("Count: ", "a b a", "1 + 1 =")
            tape.prompts = [tokenizer.encode(t)[:8] for t in texts]
    if not hasattr(stage, "sampling"):
        _leave_one_token(tape.calls[-1].batches)
    return tape


def _recorders(live: Any) -> list[_Recorder]:
    return [value for value in vars(live).values() if isinstance(value, _Recorder)]


def _leave_one_token(batches: list[MicroBatch]) -> None:
    """The last update of a supervised stage learns from a single token of the global batch."""
    seen = False
    for i, batch in enumerate(batches):
        mask_BT = torch.zeros_like(batch.loss_mask_BT)
        if not seen and bool(batch.loss_mask_BT.any()):
            seen = True
            row, column = batch.loss_mask_BT.nonzero()[-1].tolist()
            mask_BT[row, column] = True
        batches[i] = dataclasses.replace(batch, loss_mask_BT=mask_BT)
