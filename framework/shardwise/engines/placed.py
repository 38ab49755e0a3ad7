"""An engine on some ranks of the world, as all of them see it.

Roles of reinforcement learning may live on disjoint ranks. Every rank runs the same stage; on a
rank outside, the engine computes nothing, has no share of a batch (``data_rank`` -1), and learns
only what it asks for: sums, weights, a value to `broadcast`. Calls that compute talk to nobody
outside, so that engines on disjoint ranks work at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.config.adapters import AdapterConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Scaled, Share, State
from shardwise.losses.contract import Loss
from shardwise.parallel.collectives import broadcast_bytes
from shardwise.precision.policy import Found


class PlacedEngine:
    """See `engines.base.Engine`. ``inner`` is None on ranks outside of ``ranks``."""

    def __init__(
        self,
        inner: Engine | None,
        ranks: Sequence[int],
        data_size: int,
        device: torch.device,
        adapter_config: AdapterConfig | None = None,
    ) -> None:
        self.adapter_config = adapter_config
        self.inner, self.source, self.device = inner, ranks[0], device
        self.data_rank = -1 if inner is None else inner.data_rank
        self.data_size = data_size

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """Outside: nothing, and no metrics."""
        return {} if self.inner is None else self.inner.forward_backward(microbatches, loss, lr)

    def step(self, lr: float) -> float:
        """Outside: nothing, and a norm of 0."""
        return 0.0 if self.inner is None else self.inner.step(lr)

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """Outside: there are no micro-batches."""
        return [] if self.inner is None else self.inner.forward(microbatches, fn)

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """The same list on every rank of the world."""
        sums = None if self.inner is None else self.inner.sum_over_data(values)
        vector = torch.tensor(sums or [0.0] * len(values), dtype=torch.float64, device=self.device)
        dist.broadcast(vector, src=self.source)
        return [float(v) for v in vector.tolist()]

    def broadcast(self, value: Any) -> Any:
        """What the first of the engine's ranks knows."""
        assert dist.group.WORLD is not None
        said = json.dumps(value).encode() if dist.get_rank() == self.source else None
        return json.loads(broadcast_bytes(said, self.source, dist.group.WORLD))

    def events(self) -> list[tuple[str, str]]:
        """What the first of the engine's ranks has to tell, on every rank of the world."""
        told = [] if self.inner is None else [list(e) for e in self.inner.events()]
        return [(kind, text) for kind, text in self.broadcast(told)]

    def state_dict(self) -> State:
        """Outside: the JSON part alone."""
        state = State({}, {}) if self.inner is None else self.inner.state_dict()
        return dataclasses.replace(state, meta=self.broadcast(state.meta))

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Outside: nothing."""
        if self.inner is not None:
            self.inner.load_state_dict(state)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Full tensors on every rank of the world, one at a time."""
        yield from self._spread(iter(()) if self.inner is None else self.inner.weights())

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Outside: nothing, and nothing is missing."""
        return [] if self.inner is None else self.inner.load_weights(stream)

    def start_adapter(self) -> None:
        """Outside: nothing."""
        if self.inner is not None:
            self.inner.start_adapter()

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Full tensors on every rank of the world, one at a time."""
        yield from self._spread(iter(()) if self.inner is None else self.inner.full(kind))

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Outside: nothing."""
        yield from () if self.inner is None else self.inner.held(kind)

    @property
    def loss_scale(self) -> float:
        """Outside: there is none."""
        return 1.0 if self.inner is None else self.inner.loss_scale

    def optimizer_states(self) -> list[str]:
        """The same on every rank of the world."""
        return list(self.broadcast([] if self.inner is None else self.inner.optimizer_states()))

    def scales(self) -> Iterator[tuple[str, Tensor]]:
        """Outside: none."""
        yield from () if self.inner is None else self.inner.scales()

    def watch_scales(
        self, listener: Callable[[Scaled], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Outside: nothing is scaled."""
        if self.inner is None:
            return contextlib.nullcontext()
        return self.inner.watch_scales(listener)

    def dtypes(self) -> Found:
        """Outside: nothing is kept."""
        return {} if self.inner is None else self.inner.dtypes()

    def share_of(self, batch: MicroBatch) -> Share:
        """Outside: none of them."""
        nothing = torch.empty(0, dtype=torch.int64)
        return Share(nothing, nothing) if self.inner is None else self.inner.share_of(batch)

    def modules(self) -> list[nn.Module]:
        """Outside: none."""
        return [] if self.inner is None else self.inner.modules()

    def close(self) -> None:
        """Outside: nothing."""
        if self.inner is not None:
            self.inner.close()

    def _spread(self, stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Named tensors that the engine's ranks hold whole, on every rank of the world."""
        while True:
            name, value = next(stream, ("", None))
            head = None if value is None else [name, str(value.dtype)[6:], list(value.shape)]
            head = self.broadcast(head)
            if head is None:
                return
            name, dtype, shape = head
            if value is None:
                value = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
            value = value.contiguous()
            dist.broadcast(value, src=self.source)
            yield name, value
