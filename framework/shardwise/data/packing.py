"""From documents to fixed-length rows, without attention, positions or targets leaking.

A row holds pairs (input token, the token it should predict). Shapes: B rows, T pairs of a row,
N pairs of a document.

Pre-training. A stored document ends with EOS; before its first token the model reads a start token
(BOS, or EOS where there is none), so every stored token is the target of exactly one pair, and the
pairs of all documents in a line are simply the flat token array: row i predicts tokens
[i*T, (i+1)*T), and its inputs are the same tokens one earlier, with the start token where a
document begins. Nothing is materialised. A document cut by a row's end goes on in the next row
with its positions from 0, since its context is gone.

Fine-tuning. Whole examples are placed into rows best-fit, longest first; what is too long is
truncated, dropped or an error, as the caller says, and counted.

Padding is a segment of its own, is never valid, and comes last.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from shardwise.data import left_out
from shardwise.data.batch import MicroBatch
from shardwise.data.config import TooLong
from shardwise.data.indexed import IndexedStore
from shardwise.errors import DataError, UserError

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One row, each field [T]: int64, but ``loss_mask`` bool. Segments count from 0."""

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    segment_ids: NDArray[np.int64]
    num_documents: int  # padding not counted


class PackedRows:
    """Documents, each ending with EOS, as rows of ``seq_len`` pairs; the last row may be padded.

    ``tokens``: flat ids of all documents; ``starts``: int64 [documents + 1], where each begins.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        starts: NDArray[np.int64],
        seq_len: int,
        start_id: int,
        pad_id: int,
    ) -> None:
        if seq_len < 1:
            raise UserError(f"batch.seq_len must be positive, not {seq_len}")
        # An empty document has no pair; without it every boundary opens a document.
        self._starts = starts[np.append(True, np.diff(starts) > 0)]
        if self._starts.size < 2:
            raise DataError("there are no tokens to pack; the documents are all empty")
        self.tokens, self.seq_len, self.start_id, self.pad_id = tokens, seq_len, start_id, pad_id
        self.num_tokens = int(self._starts[-1])
        self.num_rows = -(-self.num_tokens // seq_len)

    @classmethod
    def from_store(
        cls, store: IndexedStore, seq_len: int, start_id: int, pad_id: int
    ) -> PackedRows:
        """Rows over an open store."""
        return cls(store.tokens, store.starts, seq_len, start_id, pad_id)

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> Row:
        """Row ``index``: O(seq_len), whatever the number of documents."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        return self.cut(index * self.seq_len)

    def num_pairs(self, index: int) -> int:
        """Pairs of row ``index``, padding left out."""
        return min(self.seq_len, self.num_tokens - index * self.seq_len)

    def cut(self, begin: int) -> Row:
        """The row whose first target is token ``begin`` of the stream."""
        T = self.seq_len
        end = min(begin + T, self.num_tokens)
        num_pairs = end - begin
        targets = np.full(T, self.pad_id, dtype=np.int64)
        targets[:num_pairs] = self.tokens[begin:end]
        input_ids = np.full(T, self.pad_id, dtype=np.int64)
        input_ids[1:num_pairs] = targets[: num_pairs - 1]
        input_ids[0] = self.tokens[begin - 1] if begin else self.start_id
        first, last = np.searchsorted(self._starts, (begin, end))
        opens = self._starts[first:last] - begin  # where documents begin inside this row
        input_ids[opens] = self.start_id
        borders = opens if opens.size and opens[0] == 0 else np.concatenate(([0], opens))
        return _row(input_ids, targets, np.arange(T) < num_pairs, borders, num_pairs)


class SlidingRows:
    """The same stream as overlapping rows, for evaluation: each token is valid exactly once.

    Rows start ``stride`` tokens apart and score their last ``stride`` tokens (the first row all of
    its), so that a token sees at least ``seq_len - stride`` earlier ones of its document.
    """

    def __init__(self, rows: PackedRows, stride: int) -> None:
        if not 1 <= stride <= rows.seq_len:
            raise UserError(f"stride: {stride} must be between 1 and seq_len {rows.seq_len}")
        self.rows, self.stride = rows, stride
        self.num_rows = 1 + max(0, -(-(rows.num_tokens - rows.seq_len) // stride))

    def row(self, index: int) -> Row:
        """Row ``index``; raises IndexError beyond the last."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        row = self.rows.cut(index * self.stride)
        if index:
            row.loss_mask[: self.rows.seq_len - self.stride] = False
        return row


def _row(
    input_ids: NDArray[np.int64],
    targets: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    borders: NDArray[np.int64],
    num_pairs: int,
) -> Row:
    """Add positions and segments: a document begins at each of ``borders``, padding at the end."""
    T = input_ids.size
    cuts = np.append(borders, num_pairs) if num_pairs < T else borders
    opens = np.zeros(T, dtype=np.int64)
    opens[cuts[1:]] = 1
    segment_ids = np.cumsum(opens)
    position_ids = np.arange(T) - cuts[segment_ids]
    return Row(input_ids, position_ids, targets, loss_mask, segment_ids, borders.size)


def collate(rows: Sequence[Row], sample_ids: ArrayLike, packed: bool | None = None) -> MicroBatch:
    """Rows of one length as a batch; ``sample_ids`` (int64 [B]) are their global indices.

    ``segment_ids_BT`` is None when each row is a single document: right padding cannot be seen by
    causal attention, and a plain causal mask is faster. ``packed`` True keeps them, False says that
    no row holds several documents.
    """

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(r, name) for r in rows]))

    if not packed:
        several = any(r.num_documents > 1 for r in rows)
        assert not (several and packed is False), "a row holds several documents"
        packed = several
    return MicroBatch(
        input_ids_BT=stack("input_ids"),
        position_ids_BT=stack("position_ids"),
        targets_BT=stack("targets"),
        loss_mask_BT=stack("loss_mask"),
        sample_ids_B=torch.as_tensor(np.asarray(sample_ids, dtype=np.int64)),
        segment_ids_BT=stack("segment_ids") if packed else None,
    )


class Example(NamedTuple):
    """A fine-tuning example: token ids, which of them are to be learned, and where it stands."""

    ids: Sequence[int]
    loss_mask: Sequence[bool]
    where: str = ""


@dataclasses.dataclass(frozen=True)
class PackingReport:
    """What became of the examples; ``num_unlearnable`` lost (or never had) every valid token."""

    num_examples: int
    num_truncated: int
    num_dropped: int
    num_unlearnable: int
    num_rows: int
    fill: float  # pairs over room


class PackedExamples:
    """Whole examples in rows of ``seq_len`` pairs (or one a row, with ``pack=False``).

    ``too_long`` decides about examples of more than ``seq_len + 1`` tokens. Examples left without
    a valid token are taken out. The counts are in ``report`` and, when not 0, in a warning.
    """

    def __init__(
        self,
        examples: Sequence[Example | tuple[Sequence[int], Sequence[bool]]],
        seq_len: int,
        pad_id: int,
        *,
        too_long: TooLong = "error",
        pack: bool = True,
    ) -> None:
        self.seq_len, self.pad_id = seq_len, pad_id
        self._examples: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
        truncated = dropped = unlearnable = 0
        for i, (ids, mask, *named) in enumerate(examples):
            where = named[0] if named and named[0] else f"example {i}"
            if len(ids) != len(mask):
                raise DataError(f"{where}: {len(ids)} ids but {len(mask)} mask values")
            if len(ids) > seq_len + 1:
                if too_long == "error":
                    raise DataError(
                        f"{where} has {len(ids)} tokens, more than batch.seq_len + 1 = "
                        f"{seq_len + 1}; raise it, or set data.too_long to truncate or drop"
                    )
                truncated += too_long == "truncate"
                dropped += too_long == "drop"
                if too_long == "drop":
                    left_out.leave_out(left_out.too_long(seq_len + 1), where)
                    continue
            learn = np.asarray(mask[: seq_len + 1], dtype=np.bool_)
            if not learn[1:].any():
                unlearnable += 1
                left_out.leave_out(left_out.NOTHING_TO_LEARN, where)
                continue
            self._examples.append((np.asarray(ids[: seq_len + 1], dtype=np.int64), learn))
        if not self._examples:
            raise DataError(f"none of {len(examples)} examples has a token to learn")
        sizes = [ids.size - 1 for ids, _ in self._examples]
        self._rows = best_fit(sizes, seq_len) if pack else [[i] for i in range(len(sizes))]
        self.num_rows = len(self._rows)
        fill = sum(sizes) / (self.num_rows * seq_len)
        self.report = PackingReport(
            len(examples), truncated, dropped, unlearnable, self.num_rows, fill
        )
        if truncated or dropped or unlearnable:
            log.warning("%s", self.report)

    def __len__(self) -> int:
        return self.num_rows

    def num_pairs(self, index: int) -> int:
        """Pairs of row ``index``, padding left out."""
        return sum(self._examples[i][0].size - 1 for i in self._rows[index])

    def row(self, index: int) -> Row:
        """Row ``index``, its examples in their given order."""
        members = [self._examples[i] for i in self._rows[index]]
        sizes = [ids.size - 1 for ids, _ in members]
        num_pairs = sum(sizes)
        input_ids = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        targets = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        loss_mask = np.zeros(self.seq_len, dtype=np.bool_)
        input_ids[:num_pairs] = np.concatenate([ids[:-1] for ids, _ in members])
        targets[:num_pairs] = np.concatenate([ids[1:] for ids, _ in members])
        loss_mask[:num_pairs] = np.concatenate([learn[1:] for _, learn in members])
        borders = np.cumsum([0, *sizes[:-1]])
        return _row(input_ids, targets, loss_mask, borders, num_pairs)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items into bins, longest first, each where it leaves the least room; deterministic.

    Bins and their items come back in the items' given order. Every size must be in [1, capacity].
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set when some bin has r left
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fitting = rooms >> sizes[i]
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + sizes[i]
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        left = room - sizes[i]
        if left:
            by_room.setdefault(left, []).append(row)
            rooms |= 1 << left
    return sorted(sorted(r) for r in rows)
