"""Quantised weights as the papers have them, read back in full. The oracle's own.

- NF4 with double quantisation (Dettmers et al. 2023, sections 2 and 3, appendix E): blocks of 64
  scaled by their absmax, each number replaced by the nearest of 16; the absmaxes, less their mean,
  in blocks of 256 scaled by theirs, each replaced by the nearest of 256 (Dettmers et al. 2022,
  "8-bit Optimizers via Block-wise Quantization", section 1.3), of 65,536 even steps.
- int8: rows scaled by their absmax to 127 (Dettmers et al. 2022, "LLM.int8()", section 2.1), of
  weights in fp16.

The native engine never imports this, nor this what it quantises with.
"""

from __future__ import annotations

import torch
from torch import Tensor

NESTED_BLOCK = 256  # absmaxes

# Appendix E.
_NORMAL = torch.tensor(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0]
)  # fmt: skip


def is_quantised(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer in a block."""
    parts = name.split(".")
    linear = ("q", "k", "v", "o", "gate", "up", "down")
    return parts[0] == "layers" and parts[-2] in linear and parts[-1] == "weight"


def as_quantised(weight: Tensor, kind: str) -> Tensor:
    """What is left of a weight, in its own shape and dtype."""
    return (_nf4 if kind == "nf4" else _int8)(weight).to(weight.dtype)


def _int8(weight: Tensor) -> Tensor:
    rows = []
    for row in weight.half():
        absmax = row.abs().max().float()
        steps = torch.round(row * (127.0 / absmax).view(1)) if absmax > 0 else torch.zeros(len(row))
        rows.append(steps * absmax * (1.0 / 127.0))
    return torch.stack(rows)


def _nf4(weight: Tensor) -> Tensor:
    blocks = list(weight.float().flatten().split(64))
    absmax = torch.stack([block.abs().max() for block in blocks])
    ragged = len(blocks[-1]) < 64
    borders = (_NORMAL[1:] + _NORMAL[:-1]) / 2
    found = []
    for i, (block, kept) in enumerate(zip(blocks, _doubly(absmax), strict=True)):
        least = absmax[i].clamp(min=1e-38)
        # A multiplication by the inverse in whole blocks, as the authors' own code has it.
        scaled = block / least if ragged and i == len(blocks) - 1 else block * (1.0 / least)
        nearest = (scaled[:, None] > borders).sum(1)
        found.append(_NORMAL[nearest] * kept)
    return torch.cat(found).view(weight.shape)


def _doubly(absmax: Tensor) -> Tensor:
    """The absmaxes, read back."""
    table, mean = _dynamic(), absmax.mean()
    found = []
    for block in (absmax - mean).split(NESTED_BLOCK):
        most = block.abs().max()
        if most == 0:
            found.append(torch.zeros(len(block)) + mean)
            continue
        step = ((block / most + 1.0) * 0.5 * 65535.0 + 0.5).floor()
        even = step * torch.tensor(2.0 / 65535.0) - 1.0
        # Of two that are as near, the lower.
        nearest = (even[:, None] - table).abs().argmin(1)
        found.append(table[nearest] * most + mean)
    return torch.cat(found)


def _dynamic() -> Tensor:
    """256 numbers: a sign, a decade, and a fraction with the bits that the decade leaves."""
    numbers = [0.0, 1.0]
    for bits in range(7):
        edges = torch.linspace(0.1, 1.0, 2**bits + 1)
        for middle in (10.0 ** (bits - 6) * ((edges[1:] + edges[:-1]) / 2)).tolist():
            numbers += [middle, -middle]
    return torch.tensor(sorted(numbers))
