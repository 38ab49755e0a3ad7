"""A frozen role on the base of another role's engine: the same weights, an adapter of its own.

A reference is what the actor was when it started, hence the base with the adapter of then (not the
base alone: TRL#1340). So it needs no memory but for that adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, State
from shardwise.losses.contract import Loss


class SharedBase:
    """See `engines.base.Engine`; it is evaluated alone. What is not said here is ``inner``'s.

    It keeps this rank's part of the adapter as it is when this is made, and puts it in place of the
    live one while it computes.
    """

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.kept = {n: t.clone() for n, t in self._live().items()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _live(self) -> dict[str, Tensor]:
        """What is trained of the model, here, as the engine has it now."""
        tensors = self.inner.state_dict().tensors
        prefix = "model."
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[dict[str, Tensor]]:
        live = self._live()
        own = {name: tensor.clone() for name, tensor in live.items()}
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(self.kept[name])
        try:
            yield live
        finally:
            with torch.no_grad():
                for name, tensor in self._live().items():
                    tensor.copy_(own[name])

    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """See `Engine`."""
        with self._in_place():
            return self.inner.forward(microbatches, fn)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`; the other role may not compute in between."""
        with self._in_place():
            yield from self.inner.weights()

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`; the other role may not compute in between."""
        assert kind == "weights", "it learns nothing"
        with self._in_place():
            yield from self.inner.full(kind)

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`."""
        assert kind == "weights", "it learns nothing"
        for name, value in self.inner.held(kind):
            yield name, self.kept.get(name, value)

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See `Engine`; the base is both roles'."""
        with self._in_place() as live:
            missing = self.inner.load_weights(stream)
            self.kept = {name: tensor.clone() for name, tensor in live.items()}
        return missing

    def start_adapter(self) -> None:
        """It has started with the other role's."""

    def optimizer_states(self) -> list[str]:
        """None."""
        return []

    def state_dict(self) -> State:
        """Nothing: it follows from where the other role started."""
        return State({}, {})

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Nothing."""

    def forward_backward(self, microbatches: Sequence[MicroBatch], loss: Loss) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError("a role on another one's base stands still")

    def step(self, lr: float) -> NoReturn:
        """Raises RuntimeError."""
        raise RuntimeError("a role on another one's base stands still")

    def close(self) -> None:
        """Its adapter alone."""
        self.kept.clear()
