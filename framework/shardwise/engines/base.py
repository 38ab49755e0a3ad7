"""The engine contract (design decision 8). Stages talk to nothing else.

Names of parameters are ours (``layers.0.attn.q.weight``), whatever the layout. A *kind* of tensors
is ``weights``, ``grads`` (between `Engine.forward_backward` and `Engine.step`), or one of
`Engine.optimizer_states`; the last two of what is trained alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shardwise.adapters.trained import EVERYTHING, Trained
from shardwise.config.adapters import AdapterConfig
from shardwise.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import Loss
from shardwise.parallel.layout import Layout
from shardwise.precision.policy import Found


@dataclasses.dataclass(frozen=True)
class Setup:
    """What an engine is built from.

    ``seed``: root of the initial weights and of dropout. ``stage``: the training stage's name, part
    of dropout's rng keys. ``optimizer``: None for a model that is only evaluated. ``wide_logits``:
    the head's product gives fp32 logits of bf16 or fp16 operands, for losses that compare
    log-probabilities of two computations. ``trained``: what of the model is.
    ``beside``: an engine of the same model and layout, at its start, on whose base this one, which
    is not trained, may stand. ``ranks``: of the world, ascending; None: all.
    """

    model: ModelConfig
    config: EngineConfig
    layout: Layout
    device: torch.device
    seed: int
    stage: str = ""
    optimizer: OptimizerConfig | None = None
    wide_logits: bool = False
    trained: Trained = EVERYTHING
    beside: Engine | None = None
    ranks: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Scaled:
    """What one backward pass of a quantised linear layer scaled by.

    ``part``: which rank's share of the product, ``cp rank * tp + tp rank``. ``amax_3`` (fp32): of
    input x, weight w, gradient of the output g. ``scale_inv``: inverses of scales by operand;
    ``xt`` and so on, where one is quantised a second time for a product over its other axis.
    """

    path: str
    part: int
    amax_3: Tensor
    scale_inv: Mapping[str, Tensor]


@dataclasses.dataclass
class State:
    """All that a resume needs: tensors (possibly DTensors, by name) and plain JSON.

    ``nonfinite`` names those tensors that may hold NaN and infinities.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    nonfinite: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Share:
    """Which tokens of a micro-batch a rank computes (t), and which of them between blocks.

    int64 positions in the rows; those from the rows' length on are padding. Features of cut layers
    are the ``rank``-th of ``size`` equal parts.
    """

    tokens_t: Tensor
    between_t: Tensor
    rank: int = 0
    size: int = 1


class Engine(Protocol):
    """A model, its optimizer and its layout."""

    data_rank: int  # which slice of a global batch this rank computes; -1: none
    data_size: int  # into how many slices a global batch is cut
    adapter_config: AdapterConfig | None  # of what is trained beside the model

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """Accumulate gradients of the global batch; returns reduced metrics, with `loss`.

        One call for all micro-batches of an update, then `step`; a second call before it may
        raise RuntimeError. ``lr``: that of the step to come, for optimizers that move weights in
        the backward pass; their gradients are gone behind it, and no kind ``grads`` is held.
        """
        ...

    def step(self, lr: float) -> float:
        """Clip and update; returns the global gradient norm before clipping.

        NaN or infinity in the norm means that every rank skipped the update.
        """
        ...

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """Without gradient: ``fn(logits, batch)`` for each micro-batch of this rank."""
        ...

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum numbers over the data ranks, in fp64; every rank of the world gets the sums."""
        ...

    def broadcast(self, value: Any) -> Any:
        """A value (plain JSON) that the engine's ranks agree on, on every rank of the world."""
        ...

    def events(self) -> list[tuple[str, str]]:
        """What happened inside since the last call that a log should tell, as (kind, text)."""
        ...

    def state_dict(self) -> State:
        """Weights (``model.*``) and optimizer state (``optim.*``), fp32 masters."""
        ...

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Take over the JSON part of a state whose tensors were loaded in place."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face names, one at a time; a collective call.

        Those of a plain model: an adapter is merged. One that cannot be comes behind them, under
        our names.
        """
        ...

    def start_adapter(self) -> None:
        """Give an adapter its initial values, beside the weights of now; a collective call."""
        ...

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Copy full tensors, present on every rank, into the parameters of their names.

        Names that are no parameter's here are passed over. Returns the parameters held here that
        the stream left out, but for an adapter's. Raises CheckpointError for a shape that does not
        fit.
        """
        ...

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Full tensors of a kind on every rank, one at a time; a collective call."""
        ...

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Like `full`, but this rank's own parts (tensors or DTensors), without a collective.

        Also ``copies``: what last computed in place of weights, if that stays and they do not move.
        """
        ...

    @property
    def loss_scale(self) -> float:
        """What gradients are multiplied by between `forward_backward` and `step` (fp16)."""
        ...

    def optimizer_states(self) -> list[str]:
        """Kinds of tensors that the optimizer keeps a parameter: ``exp_avg``; no counters."""
        ...

    def scales(self) -> Iterator[tuple[str, Tensor]]:
        """Of quantised products: what this rank's scales will follow from, live."""
        ...

    def watch_scales(
        self, listener: Callable[[Scaled], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Tell ``listener`` of every quantised layer's backward pass inside."""
        ...

    def dtypes(self) -> Found:
        """In which dtypes this rank computes and keeps what, by the policy's names.

        As found, not as configured: fp32 memory that holds bf16's numbers is bf16 (`narrowest`).
        Asked between `forward_backward` and `step`; see `precision.policy.DtypeCheck`.
        """
        ...

    def share_of(self, batch: MicroBatch) -> Share:
        """What this rank holds of the activations of a micro-batch."""
        ...

    def modules(self) -> list[nn.Module]:
        """The parts of the model that compute on this rank; module paths are the plain model's."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it is not used again."""
        ...


Build = Callable[[Setup], Engine | None]
