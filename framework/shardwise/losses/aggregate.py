"""How per-token losses become one number, folded into two per-token weights beforehand.

Every published aggregation is sum_t w_t l_t / sum_t c_t over the valid tokens of the *global*
batch. The engine reduces the denominator over all micro-batches and data ranks before it divides
(design decision 2), so a sequence weighs the same in whatever micro-batch, row or padding it
stands. Only whole sequences may be folded: fold before cutting one over ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.losses.config import Aggregation

# Shape suffixes: B rows, T tokens, S slots for sequences (B * T, an upper bound).


def fold(
    aggregation: Aggregation,
    mask_BT: Tensor,
    segment_ids_BT: Tensor | None = None,
    length_constant: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``(weight_BT, count_BT)``, float64, zero where ``mask_BT`` (bool) is False.

    With |y| the valid tokens of a sequence; sequences without any are not counted:

    - token_mean (DAPO, Yu et al. 2025, equation 8): w = 1, c = 1.
    - token_sum: w = 1, c = 0 (not divided, see losses.contract).
    - seq_mean_token_mean (GRPO, Shao et al. 2024, equation 3): w = 1/|y|, one count a sequence.
    - seq_mean_token_sum: w = 1, one count a sequence.
    - constant (Dr. GRPO, Liu et al. 2025, section 3.2): w = 1/length_constant, one count a
      sequence. The constant is a setting, the longest response allowed, never the padded width.
    """
    mask = mask_BT.double()
    if aggregation == "token_mean":
        return mask, mask
    if aggregation == "token_sum":
        return mask, torch.zeros_like(mask)
    firsts = first_valid(mask_BT, segment_ids_BT).double()
    if aggregation == "seq_mean_token_mean":
        return mask / sequence_sum(mask, segment_ids_BT).clamp(min=1.0), firsts
    if aggregation == "seq_mean_token_sum":
        return mask, firsts
    if aggregation != "constant":
        raise ConfigError(f"unknown aggregation {aggregation!r}")
    if length_constant is None or length_constant < 1:
        raise ConfigError(
            "aggregation 'constant' needs length_constant: the longest response allowed, in tokens"
        )
    return mask / length_constant, firsts


def sequence_sum(x_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
    """Each token gets the sum of ``x_BT`` over its own sequence (a row, or a run of a segment)."""
    if segment_ids_BT is None:
        return x_BT.sum(dim=-1, keepdim=True).expand_as(x_BT)
    slot_BT = _sequence_slots(segment_ids_BT)
    sums_S = x_BT.new_zeros(x_BT.numel()).index_add(0, slot_BT.flatten(), x_BT.flatten())
    return sums_S[slot_BT]


def first_valid(mask_BT: Tensor, segment_ids_BT: Tensor | None = None) -> Tensor:
    """True at the first valid token of each sequence (bool)."""
    if segment_ids_BT is None:
        return mask_BT & (mask_BT.cumsum(dim=-1) == 1)
    starts_BT = _starts(segment_ids_BT)
    total_BT = mask_BT.cumsum(dim=-1)
    # Valid tokens of the row before the current run began, carried along by a running maximum.
    before_BT = torch.where(starts_BT, total_BT - mask_BT.long(), 0).cummax(dim=-1).values
    return mask_BT & (total_BT - before_BT == 1)


def _starts(segment_ids_BT: Tensor) -> Tensor:
    """True where a row or a run of equal segment ids begins."""
    starts_BT = torch.ones_like(segment_ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return starts_BT


def _sequence_slots(segment_ids_BT: Tensor) -> Tensor:
    """A number in [0, B * T) per token, equal within a sequence and nowhere else."""
    starts_BT = _starts(segment_ids_BT)
    return (starts_BT.flatten().cumsum(0) - 1).view_as(segment_ids_BT)
