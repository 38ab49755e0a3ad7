"""Rotary position embedding in the layout of Llama: the two halves of a head form the pairs.

Su et al. 2021 (RoFormer), section 3.4.2. Frequencies are a pure function of the settings, computed
per forward pass (a few dozen numbers), so that no buffer needs care on meta devices or checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardwise.ops.rope_scaling import RopeScaling

# Shape suffixes: B sequences, T tokens, H heads, K head width, R = K / 2 rotated pairs.


def frequencies(
    head_dim: int,
    base: float,
    scaling: RopeScaling | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, float]:
    """Angular frequencies (R, ``dtype``) and the factor by which cos and sin are multiplied."""
    exponent_R = torch.arange(0, head_dim, 2, device=device, dtype=torch.int64).to(dtype) / head_dim
    freq_R = 1.0 / (base**exponent_R)
    if scaling is None:
        return freq_R, 1.0
    if scaling.kind == "linear":
        return freq_R / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(freq_R, scaling), 1.0
    return _yarn(freq_R, head_dim, base, scaling)


def _llama3(freq_R: Tensor, s: RopeScaling) -> Tensor:
    wavelength_R = 2 * math.pi / freq_R
    low, high = s.low_freq_factor, s.high_freq_factor
    smooth_R = (s.original_max_seq_len / wavelength_R - low) / (high - low)
    blended_R = (1 - smooth_R) * freq_R / s.factor + smooth_R * freq_R
    scaled_R = torch.where(
        wavelength_R > s.original_max_seq_len / low, freq_R / s.factor, blended_R
    )
    return torch.where(wavelength_R < s.original_max_seq_len / high, freq_R, scaled_R)


def _yarn(freq_R: Tensor, head_dim: int, base: float, s: RopeScaling) -> tuple[Tensor, float]:
    def pair_of(num_rotations: float) -> float:
        """Index of the pair that turns ``num_rotations`` times within the original context."""
        turns = s.original_max_seq_len / (num_rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(pair_of(s.beta_fast)), 0)
    high = min(math.ceil(pair_of(s.beta_slow)), head_dim - 1)
    width = max(high - low, 0.001)
    index_R = torch.arange(head_dim // 2, device=freq_R.device, dtype=freq_R.dtype)
    interpolate_R = ((index_R - low) / width).clamp(0, 1)
    scaled_R = freq_R / s.factor * interpolate_R + freq_R * (1 - interpolate_R)
    factor = s.attention_factor
    if factor is None:
        factor = 0.1 * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0
    return scaled_R, factor


def tables(
    position_ids_BT: Tensor,
    head_dim: int,
    base: float,
    scaling: RopeScaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin (BTR) of every position, in fp32, or in fp64 when ``dtype`` is fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    freq_R, factor = frequencies(head_dim, base, scaling, device=position_ids_BT.device, dtype=wide)
    angle_BTR = position_ids_BT[..., None].to(wide) * freq_R
    return angle_BTR.cos() * factor, angle_BTR.sin() * factor


def rotate(x_BHTK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate queries or keys; computed in the tables' dtype, returned in the dtype of ``x``."""
    cos, sin = cos_BTR[:, None], sin_BTR[:, None]
    first, second = x_BHTK.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BHTK.dtype)
