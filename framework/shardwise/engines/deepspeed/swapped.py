"""Masters, moments and gradients on NVMe (ZeRO-Infinity, Rajbhandari et al. 2021).

The library brings a group of them to memory for its update and sends it back. Whoever reads or
writes them between updates (a checkpoint, a comparison, initial weights) gets copies of this rank's
part in memory; what was written into is sent back before the next pass. Groups under a megabyte
never leave memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.optim.torch_kinds import start_state

Values = dict[str, Tensor]  # "weights", "grads" if there are any, and the optimizer's states


class Swapped:
    """Of one optimizer: ``flats`` are what it updates on this rank, ``inner`` is torch's."""

    def __init__(self, outer: Any, inner: torch.optim.Optimizer, flats: Sequence[Tensor]) -> None:
        self.outer, self.inner = outer, inner
        swaps = getattr(outer, "swap_optimizer", False)
        self.numbers = {
            flat: i
            for i, flat in enumerate(flats)
            if swaps and outer._swappable_optimizer_subgroup(i)
        }
        self.here: dict[Tensor, Values] = {}

    def __contains__(self, flat: Tensor) -> bool:
        return flat in self.numbers

    @contextlib.contextmanager
    def resident(self, flat: Tensor, write: bool) -> Iterator[None]:
        """A group in memory; ``write``: and what it has become then stored."""
        number = self.numbers.get(flat)
        if number is None:
            yield
            return
        self.outer._optimizer_states_and_gradient_swap_in(number)
        yield
        if write:
            self.outer._writeback_swap_state(number, write_opt_state=True, write_gradients=False)
        else:
            self.outer._release_swap_buffers(number)

    def start(self, flat: Tensor, group: dict[str, Any]) -> None:
        """The optimizer's state of ``flat`` before its first update, stored where it belongs."""
        with self.resident(flat, write=True):
            start_state(self.inner, group, flat)

    def values(self, flat: Tensor) -> Values:
        """Copies of a group in memory, the same until `send_back`."""
        if flat not in self.here:
            with self.resident(flat, write=False):
                found = {"weights": flat.detach().clone()}
                if flat.grad is not None:
                    found["grads"] = flat.grad.detach().clone()
                # A count of updates never leaves memory.
                states = self.inner.state[flat].items()
                found |= {kind: v.clone() if v.dim() else v for kind, v in states}
            self.here[flat] = found
        return self.here[flat]

    def written(self) -> bool:
        """Whether somebody has written into the copies."""
        return any(v._version for values in self.here.values() for v in values.values() if v.dim())

    @torch.no_grad()
    def send_back(self) -> None:
        """Store copies that were written into, and give up the memory of all."""
        if self.written():
            for flat, values in self.here.items():
                with self.resident(flat, write=True):
                    flat.data.copy_(values["weights"])
                    for kind, value in self.inner.state[flat].items():
                        value.copy_(values[kind])
        self.here.clear()
