"""Micro-batches put together, filled up and taken apart, as plainly as can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.ops.attention import BRANCH_SHIFT, PADDING

# Shape suffixes: B sequences, T tokens, n tokens of a document.


def pad(batch: MicroBatch, num_tokens: int) -> MicroBatch:
    """Every row filled up to ``num_tokens`` with what carries no loss and is no document's."""
    have = batch.input_ids_BT.shape[1]

    def fill(x_BT: Tensor, value: int = 0) -> Tensor:
        per_token = x_BT.dim() > 1 and x_BT.shape[1] == have
        beyond = (0, 0) * (x_BT.dim() - 2) + (0, num_tokens - have)
        return F.pad(x_BT, beyond, value=value) if per_token else x_BT

    segments_BT = batch.segment_ids_BT
    if segments_BT is not None:
        segments_BT = fill(segments_BT, PADDING)
    rest = dataclasses.replace(batch, segment_ids_BT=None).map(fill)
    return dataclasses.replace(rest, segment_ids_BT=segments_BT)


def join(batches: Sequence[MicroBatch]) -> MicroBatch:
    """The rows of all of them in one batch, as long as the longest."""
    longest = max(b.input_ids_BT.shape[1] for b in batches)
    batches = [pad(b, longest) for b in batches]
    if any(b.segment_ids_BT is not None for b in batches):
        batches = [
            dataclasses.replace(b, segment_ids_BT=torch.zeros_like(b.input_ids_BT))
            if b.segment_ids_BT is None
            else b
            for b in batches
        ]
    first = batches[0]
    fields = {
        f.name: torch.cat([getattr(b, f.name) for b in batches])
        for f in dataclasses.fields(first)
        if isinstance(getattr(first, f.name), Tensor)
    }
    extras = {k: torch.cat([b.extras[k] for b in batches]) for k in first.extras}
    return dataclasses.replace(first, **fields, extras=extras)


def documents(segments_T: Tensor) -> Iterator[Tensor]:
    """Indices (n) of the tokens of each document of a row, its branches included."""
    document_T = segments_T & ((1 << BRANCH_SHIFT) - 1)
    for number in document_T.unique().tolist():
        if number != PADDING:
            yield (document_T == number).nonzero()[:, 0]
