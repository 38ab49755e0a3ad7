"""Where a difference begins: what every module computes in an update, or in a forward pass.

Modules keep the plain model's paths under every layout, and a rank knows which rows, tokens and
features of an output it holds. So each output, and the gradient that reaches it, is a value like
any other: the first to differ, in the order of one process, names the module.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Share
from shardwise.models.common.init import plain_name
from shardwise.ops.comm import Tally
from shardwise.verify.notes import Notes

# Shape suffixes: B rows, t tokens of this rank, D features of this rank, N tokens of all rows.

_BLOCK = re.compile(r"layers\.\d+")
# Of each row of an output (tD), which of this rank's tokens it is of; None: all.
ByRow = list[tuple[Tensor, Tensor | None]]


@contextlib.contextmanager
def probing(
    engine: Engine, where: str, microbatches: Sequence[MicroBatch], notes: Notes, tally: Tally
) -> Iterator[None]:
    """Note the outputs of an engine's modules, and their gradients, of the calls inside."""
    handles = []
    for part in engine.modules():
        probe = _Probe(engine, where, microbatches, notes, tally)
        handles.append(part.register_forward_pre_hook(probe.begin, with_kwargs=True))
        for name, module in part.named_modules():
            if path := plain_name(name).replace("_checkpoint_wrapped_module", "").rstrip("."):
                handles.append(module.register_forward_hook(probe.hook(path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """One part of a model, which sees the rows of an update in their order, some at a time."""

    def __init__(
        self,
        engine: Engine,
        where: str,
        microbatches: Sequence[MicroBatch],
        notes: Notes,
        tally: Tally,
    ) -> None:
        self.engine, self.where = engine, where
        self.rows = [(batch, row) for batch in microbatches for row in range(batch.num_rows)]
        self.notes, self.tally = notes, tally
        self.first = self.next = 0  # rows of the forward pass that runs, and of the one after it
        self.seen: set[tuple[int, str]] = set()
        self.evaluates = False
        self.tokens = 0  # t
        self.read_N: Tensor | None = None  # those that the head computes, if not all

    def begin(self, module: nn.Module, inputs: Any, keywords: dict[str, Any]) -> None:
        """A forward pass of the part begins."""
        ids_BT = keywords["input_ids_BT"] if "input_ids_BT" in keywords else inputs[0]
        self.first, self.next = self.next, self.next + ids_BT.shape[0]
        self.evaluates = not torch.is_grad_enabled()
        self.tokens, self.read_N = ids_BT.shape[1], keywords.get("read_N")

    def hook(self, path: str) -> Any:
        """Of a module's forward pass."""

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            # Recomputed in the backward pass: the same again.
            if not isinstance(output, Tensor) or (self.first, path) in self.seen:
                return
            first, by_row = self.first, self._by_row(output)
            self.seen.add((first, path))
            self.note("output", path, first, by_row(output.detach()))
            if output.requires_grad:
                output.register_hook(
                    lambda grad: self.note("output gradient", path, first, by_row(grad.detach()))
                )

        return note

    def _by_row(self, output: Tensor) -> Callable[[Tensor], ByRow]:
        """How a tensor like this one, of the pass that runs, is cut into rows."""
        if output.dim() == 3:
            return lambda value_BtD: [(value_tD, None) for value_tD in value_BtD]
        read_N, tokens = self.read_N, self.tokens
        if output.dim() != 2 or read_N is None or len(read_N) != len(output):
            return lambda _: []
        places = [read_N // tokens == b for b in range(self.next - self.first)]
        return lambda value_ND: [(value_ND[here_N], read_N[here_N] % tokens) for here_N in places]

    def note(self, kind: str, path: str, first: int, by_row: ByRow) -> None:
        """The regions of a module's output that this rank holds; nothing, where that is unclear."""
        if first + len(by_row) > len(self.rows):
            return
        for (value_tD, read_t), (batch, row) in zip(by_row, self.rows[first:], strict=False):
            if kind == "output gradient":
                value_tD = value_tD / self.engine.loss_scale
            valid_T = batch.loss_mask_BT[row]
            share = self.engine.share_of(batch)
            index_t = _index(share, len(value_tD))
            if read_t is not None:
                index_t = share.tokens_t[read_t.cpu()]
            if index_t is None or not bool(valid_T.any()):
                continue
            length = int(valid_T.nonzero()[-1]) + 1  # behind, nothing is learnt from
            name = f"{kind}/{self.where} {path} sample {int(batch.sample_ids_B[row])}"
            if self.evaluates:  # a stage may ask for a sample's several times in a step
                name += f" time {self.notes.count(name)}"
            parts = [
                (token, value_tD[place : place + size])
                for token, place, size in _runs(index_t, length)
            ]
            if kind == "output gradient" and share.size > 1 and not _BLOCK.fullmatch(path):
                # Of what every tensor-parallel rank has whole, each has a part of the gradient.
                width = self.notes.width_of(name)
                if width is not None and width == value_tD.shape[1]:
                    continue
            self.notes.touched[name] = self.tally.last.get("", "")
            self.notes.note_slices(name, parts, share.rank, share.size)


def _index(share: Share, size: int) -> Tensor | None:
    """Positions of ``size`` tokens of a rank; None: it is unclear which they are."""
    for index_t in (share.tokens_t, share.between_t):
        if len(index_t) == size:
            return index_t
    return torch.arange(size) if share.size == 1 and size > len(share.tokens_t) else None


def _runs(index_t: Tensor, length: int) -> Iterator[tuple[int, int, int]]:
    """(token, place, number) of each stretch of neighbouring tokens below ``length``."""
    index = index_t.tolist()
    first = 0
    for place in range(1, len(index) + 1):
        if place < len(index) and index[place] == index[place - 1] + 1:
            continue
        size = min(place - first, length - index[first])
        if size > 0:
            yield index[first], first, size
        first = place
