"""Rotary position embedding, in the layout of Llama (the two halves of a head form the pairs) or
of the paper (neighbours do, ``interleaved``).

Su et al. 2021 (RoFormer), section 3.4.2. Frequencies are a pure function of the settings, computed
per forward pass (a few dozen numbers), so that no buffer needs care on meta devices or checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardwise.ops.rope_scaling import QueryGrowth, RopeScaling, RopeSpec

# Shape suffixes: B sequences, T tokens, H heads, K head width, R rotated pairs (K / 2 at most).


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
    if scaling.kind == "longrope":
        factors_R = torch.tensor(scaling.pair_factors, device=device, dtype=dtype)
        return 1.0 / (factors_R * base**exponent_R), _longrope_factor(scaling)
    return _yarn(freq_R, head_dim, base, scaling)


def _longrope_factor(s: RopeScaling) -> float:
    """Ding et al. 2024, "LongRoPE", section 3.3, as its release computes it."""
    if s.attention_factor is not None or s.factor <= 1.0:
        return 1.0 if s.attention_factor is None else s.attention_factor
    return math.sqrt(1 + math.log(s.factor) / math.log(s.original_max_seq_len))


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

    ends = pair_of(s.beta_fast), pair_of(s.beta_slow)
    if s.truncate:
        ends = math.floor(ends[0]), math.ceil(ends[1])
    low, high = max(ends[0], 0), min(ends[1], head_dim - 1)
    width = high - low or 0.001
    index_R = torch.arange(head_dim // 2, device=freq_R.device, dtype=freq_R.dtype)
    interpolate_R = ((index_R - low) / width).clamp(0, 1)
    scaled_R = freq_R / s.factor * interpolate_R + freq_R * (1 - interpolate_R)
    if s.attention_factor is not None:
        return scaled_R, s.attention_factor

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(s.factor) + 1.0 if s.factor > 1 else 1.0

    if s.mscale and s.mscale_all_dim:
        return scaled_R, temperature(s.mscale) / temperature(s.mscale_all_dim)
    return scaled_R, temperature(1.0)


def tables(
    position_ids_BT: Tensor, spec: RopeSpec, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin (BTR) of every position, in fp32, or in fp64 when ``dtype`` is fp64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    freq_R, factor = frequencies(
        spec.width, spec.base, spec.scaling, device=position_ids_BT.device, dtype=wide
    )
    angle_BTR = position_ids_BT[..., None].to(wide) * freq_R
    return angle_BTR.cos() * factor, angle_BTR.sin() * factor


def query_scale(position_ids_BT: Tensor, growth: QueryGrowth, dtype: torch.dtype) -> Tensor:
    """What queries are multiplied by, B1T1 in ``dtype``; computed as wide as `tables`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    periods_BT = (position_ids_BT // growth.period).to(wide)
    return (1.0 + growth.rate * periods_BT.log1p()).to(dtype)[:, None, :, None]


def rotate(x_BHTK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate queries or keys; computed in the tables' dtype, returned in the dtype of ``x``.

    Features behind the first 2 R are left as they are.
    """
    cos, sin = cos_BTR[:, None], sin_BTR[:, None]
    turned = 2 * cos.shape[-1]
    wide = x_BHTK[..., :turned].to(cos.dtype)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = wide.chunk(2, dim=-1)
    pairs = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    rotated = rotated.to(x_BHTK.dtype)
    if turned == x_BHTK.shape[-1]:
        return rotated
    return torch.cat((rotated, x_BHTK[..., turned:]), dim=-1)
