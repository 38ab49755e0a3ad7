"""Dropout whose mask is a pure function of each token's key, hence the same on every layout.

The mask is an opaque operator to `torch.compile`: the compiler would fuse the wrapping integer
arithmetic into every loop that reads the mask, which is slow to compile, and the code that it
generates for torch 2.13 on CPU does not always wrap as the eager operators do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.ops import rng

# Shape suffixes: B sequences, T tokens, F features.

_NUM_BITS = 31


@torch.library.custom_op("shardwise::keep_mask", mutates_args=())
def keep_mask(keys: Tensor, num_columns: int, p: float, offset: int = 0) -> Tensor:
    """Bool mask, true with probability ``1 - p``, one draw for every key and column.

    Returns the shape of ``keys`` with ``num_columns`` appended; ``offset`` is the global index of
    the first column. Decided in integers, so that dtypes and devices agree.
    """
    columns = torch.arange(offset, offset + num_columns, device=keys.device)
    draws = rng.bits(rng.fold(keys[..., None], columns), _NUM_BITS)
    return draws >= round(p * (1 << _NUM_BITS))


@keep_mask.register_fake
def _(keys: Tensor, num_columns: int, p: float, offset: int = 0) -> Tensor:
    return keys.new_empty((*keys.shape, num_columns), dtype=torch.bool)


def dropout(
    x_BTF: Tensor, p: float, rng_keys_BT: Tensor | None, salt: int, feature_offset: int = 0
) -> Tensor:
    """Zero each feature with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    ``rng_keys_BT`` (int64) holds a key per token; None or ``p == 0`` returns ``x`` itself. ``salt``
    tells the dropout places of one forward pass apart. ``feature_offset`` is the global index of
    the first feature, for a rank that holds a slice of F.
    """
    if rng_keys_BT is None or p == 0.0:
        return x_BTF
    keep_BTF = keep_mask(rng.fold(rng_keys_BT, salt), x_BTF.shape[-1], p, feature_offset)
    return torch.where(keep_BTF, x_BTF / (1.0 - p), 0.0)
