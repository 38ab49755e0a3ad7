"""Completions of one prompt in one row, the prompt stored once.

A row is a trunk, the prompt without its last token, and a branch for each completion: the prompt's
last token again (it predicts the branch's first token) and the completion but its last token.
Positions of every branch go on where the trunk ends, and attention lets a branch see the trunk and
itself, so each branch computes exactly what the sequence prompt + completion computes alone. With
eight short answers to a long question this is several times less work than eight rows.

Segment ids carry the tree: the low 32 bits name the document, the bits above the branch, 0 for the
trunk (`ops.attention.causal_mask` reads them so; plain packing has trunks only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from shardwise.data.batch import MicroBatch
from shardwise.errors import DataError
from shardwise.ops.attention import BRANCH_SHIFT


def collate_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    sample_ids: ArrayLike,
    pad_id: int,
    *,
    pad_multiple: int = 1,
    per_token: Mapping[str, Sequence[Sequence[ArrayLike]]] | None = None,
    keep: Sequence[Sequence[bool]] | None = None,
    valid: Sequence[Sequence[Sequence[int]]] | None = None,
    dtype: type[np.floating[Any]] = np.float32,
) -> MicroBatch:
    """One row a prompt [B, T], T the longest row rounded up to ``pad_multiple``.

    ``completions[b]``: the completions of prompt ``b``. ``per_token[name][b][i]``: a number, or
    one for each token, of completion ``i``; lands in ``extras[name]`` (``dtype`` BT) where that
    token is the target. ``keep[b][i]`` False takes completion ``i`` out of the loss. Every token
    of a kept completion is valid, or those whose numbers ``valid[b][i]`` lists. Raises DataError
    for an empty prompt or completion.
    """
    lengths = [len(p) - 1 + sum(map(len, group)) for p, group in zip(prompts, completions)]
    if min(map(len, prompts)) < 1 or any(not c for group in completions for c in group):
        raise DataError("a group needs a prompt and completions of at least one token each")
    width = -(-max(lengths) // pad_multiple) * pad_multiple
    shape = (len(prompts), width)
    ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.ones(shape, dtype=np.int64)  # padding is a document of its own
    mask = np.zeros(shape, dtype=np.bool_)
    extras = {k: np.zeros(shape, dtype=dtype) for k in per_token or {}}
    for b, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        trunk = len(prompt) - 1
        ids[b, :trunk], targets[b, :trunk] = prompt[:-1], prompt[1:]
        positions[b, :trunk], segments[b, :trunk] = np.arange(trunk), 0
        begin = trunk
        for i, completion in enumerate(group):
            end = begin + len(completion)
            ids[b, begin], ids[b, begin + 1 : end] = prompt[-1], completion[:-1]
            targets[b, begin:end] = completion
            positions[b, begin:end] = np.arange(trunk, trunk + len(completion))
            segments[b, begin:end] = (i + 1) << BRANCH_SHIFT
            which = slice(begin, end) if valid is None else [begin + n for n in valid[b][i]]
            mask[b, which] = keep is None or keep[b][i]
            for k, values in (per_token or {}).items():
                extras[k][b, begin:end] = values[b][i]
            begin = end
        positions[b, begin:] = np.arange(width - begin)
    return MicroBatch(
        input_ids_BT=torch.from_numpy(ids),
        position_ids_BT=torch.from_numpy(positions),
        targets_BT=torch.from_numpy(targets),
        loss_mask_BT=torch.from_numpy(mask),
        sample_ids_B=torch.as_tensor(np.asarray(sample_ids, dtype=np.int64)),
        segment_ids_BT=torch.from_numpy(segments),
        extras={k: torch.from_numpy(v) for k, v in extras.items()},
    )
