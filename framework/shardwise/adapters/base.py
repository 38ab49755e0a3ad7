"""What an adapter of any kind offers to whoever assembles, starts, trains and exports a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from torch import Tensor

from shardwise.memory import Adapted
from shardwise.models.common.decoder import Decoder


class Adapter(Protocol):
    """One kind with its settings, for one model."""

    has_dropout: bool

    def shape(self) -> Adapted | None:
        """What it adds to the blocks, in the numbers of `memory`; None: too little to count."""
        ...

    def attach(self, model: Decoder) -> list[str]:
        """Adapt a part of a model (on the meta device), plain or cut, in place.

        All parameters but those that the adapter trains stand still from then on. Returns the
        names of those whose gradients are partial sums over tp ranks.
        """
        ...

    def start(
        self, seed: int, names: Collection[str], weight_of: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Initial values (whole) of the adapter's parameters among ``names``.

        ``weight_of(name)``: the whole weight that is adapted, if it is asked for; a collective
        call where ranks share it.
        """
        ...

    def merge(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """An adapted model's parameters, in their order, as those of the plain model.

        Raises ConfigError where a kind is no change of weights.
        """
        ...
