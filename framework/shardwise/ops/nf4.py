"""NF4 with double quantisation, four bits and a bit for a weight (Dettmers et al. 2023, "QLoRA").

A tensor is flattened and cut into blocks of 64. Each element, divided by its block's absmax,
becomes the nearest of 16 quantiles of a normal distribution (section 3 and appendix E). The
absmaxes, less their mean, become one byte each, of a map of bytes to numbers whose exponent is
dynamic, in blocks of 256 with an fp32 absmax (Dettmers 2016, "8-Bit Approximations for Parallelism
in Deep Learning", section 2.3). That is 0.516 bytes an element.

This is bitsandbytes' format, and its numbers: bit by bit those of bitsandbytes 0.50 on a CPU. A
rank may hold a part of a tensor, but the blocks are always those of the whole tensor, so that no
layout changes a number. Where bitsandbytes is installed, it dequantises.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shardwise.ops import bitsandbytes

# Shape suffixes: N blocks, E elements and C bytes of a block (64, 32), M blocks of absmaxes, R
# runs, W blocks of a run.

BLOCK, NESTED_BLOCK = 64, 256
LEAST = 1e-38  # of an absmax that something is divided by

# Appendix E, in fp32.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Runs:
    """Elements of a flattened tensor: ``num`` runs, ``stride`` apart, of ``length`` each."""

    num: int
    first: int
    stride: int
    length: int

    @classmethod
    def of(cls, shape: Sequence[int], rows: range, columns: range) -> Runs:
        """Rows and columns of a matrix of this shape."""
        width = shape[1]
        if len(columns) == width:
            return cls(1, rows.start * width, 0, len(rows) * width)
        return cls(len(rows), rows.start * width + columns.start, width, len(columns))

    @functools.cached_property
    def offsets(self) -> list[int]:
        """Of each run's first element in its first block."""
        return [(self.first + i * self.stride) % BLOCK for i in range(self.num)]

    @property
    def num_blocks(self) -> int:
        """How many blocks the widest run touches; all runs hold as many."""
        if not self.length or not self.num:
            return 0
        return (max(self.offsets) + self.length - 1) // BLOCK + 1

    def blocks(self, device: torch.device | None = None) -> Tensor:
        """RW, int64: numbers of the blocks, in the whole tensor."""
        starts_R = torch.arange(self.num, device=device) * self.stride + self.first
        return starts_R[:, None] // BLOCK + torch.arange(self.num_blocks, device=device)

    def pick(self, values_RE: Tensor) -> Tensor:
        """The runs' own elements (R, length) of those of their blocks (R, W * 64)."""
        if len(set(self.offsets)) == 1:
            return values_RE.narrow(1, self.offsets[0], self.length)
        device = values_RE.device
        offsets_R1 = torch.tensor(self.offsets, device=device)[:, None]
        return values_RE.gather(1, offsets_R1 + torch.arange(self.length, device=device))


@dataclasses.dataclass(frozen=True)
class Nf4:
    """A quantised tensor, or a part of one.

    ``codes_NC`` (uint8): two codes a byte, the first in the high half; what a last block lacks is
    code 7, zero. ``absmax_N`` (uint8) are the blocks' absmaxes, ``nested_M`` (fp32) the absmaxes of
    those less ``offset`` (fp32, a scalar); both of the whole tensor.
    """

    codes_NC: Tensor
    absmax_N: Tensor
    nested_M: Tensor
    offset: Tensor

    def part(self, runs: Runs) -> Nf4:
        """Of a whole tensor, the blocks that these runs touch, run by run."""
        blocks = runs.blocks(self.codes_NC.device).flatten().clamp(max=len(self.absmax_N) - 1)
        return dataclasses.replace(
            self, codes_NC=self.codes_NC[blocks], absmax_N=self.absmax_N[blocks]
        )

    def scales(self, runs: Runs) -> Tensor:
        """N, fp32: the blocks' absmaxes."""
        blocks = runs.blocks(self.absmax_N.device).flatten() // NESTED_BLOCK
        nested_N = self.nested_M[blocks.clamp(max=len(self.nested_M) - 1)]
        return _byte_map(self.absmax_N.device)[self.absmax_N.int()] * nested_N + self.offset

    def dequantise(self, runs: Runs, dtype: torch.dtype) -> Tensor:
        """(R, length): the elements of a part, multiplied in fp32."""
        if not len(self.codes_NC):  # a rank without a part
            return torch.empty((runs.num, runs.length), dtype=dtype, device=self.codes_NC.device)
        wide = dequantise_blocks(self.codes_NC, self.scales(runs), dtype)
        return runs.pick(wide.view(runs.num, -1))


def quantise(tensor: Tensor) -> Nf4:
    """A whole tensor, of floating-point numbers, in its 4-bit form."""
    x_NE, last = _blocks(tensor.detach().flatten().float(), BLOCK)
    absmax_N = x_NE.abs().amax(dim=1)
    scaled_NE = x_NE * (1.0 / absmax_N.clamp(min=LEAST))[:, None]
    if last:  # the library divides there
        absmax_N[-1].clamp_(min=LEAST)
        scaled_NE[-1] = x_NE[-1] / absmax_N[-1]
    codes = torch.tensor(NF4, device=tensor.device)
    index_NE = torch.bucketize(scaled_NE.clamp(-1, 1), (codes[:-1] + codes[1:]) / 2).to(torch.uint8)
    codes_NC = index_NE[:, ::2] << 4 | index_NE[:, 1::2]
    offset = absmax_N.mean()
    nested_N, nested_M = quantise_bytes(absmax_N - offset, NESTED_BLOCK)
    return Nf4(codes_NC, nested_N, nested_M, offset)


def _blocks(flat: Tensor, size: int) -> tuple[Tensor, int]:
    """Blocks of ``size``, the last filled with zeros; and how many elements that has, 0 if all."""
    last = len(flat) % size
    filled = torch.nn.functional.pad(flat, (0, (size - last) % size))
    return filled.view(-1, size), last


def dequantise_blocks(codes_NC: Tensor, scale_N: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, 64) elements of ``dtype``: the codes' numbers times their blocks' fp32 scales."""
    if bitsandbytes.unusable(codes_NC.device) is None:
        return bitsandbytes.dequantise_nf4(codes_NC, scale_N, dtype)
    values_N64 = _pairs(codes_NC.device)[codes_NC.int()].flatten(1)
    return values_N64.mul_(scale_N[:, None]).to(dtype)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two numbers in each byte."""
    codes = torch.tensor(NF4, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([codes[byte >> 4], codes[byte & 15]], dim=1)


# --- bytes for the absmaxes -----------------------------------------------------------------------


@functools.cache
def _byte_map(device: torch.device) -> Tensor:
    """256 numbers in rising order: seven decades of -1 to 1, finer and finer, zero and one."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = ((edges[:-1] + edges[1:]) / 2.0).mul(10.0 ** (decade - 6)).tolist()
        found += middles + [-x for x in middles]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@functools.cache
def _byte_of(device: torch.device) -> Tensor:
    """Of 65,536 even steps from -1 to 1, the byte whose number is nearest."""
    step = torch.arange(65_536, dtype=torch.float32) * torch.tensor(2.0 / 65_535) - 1.0
    codes = _byte_map(torch.device("cpu"))
    right = torch.searchsorted(codes, step).clamp(1, 255)
    left = right - 1
    nearer = (step - codes[left]) <= (codes[right] - step)
    return torch.where(nearer, left, right).to(torch.uint8).to(device)


def quantise_bytes(flat: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """fp32 numbers as bytes (uint8) of the dynamic map, and their blocks' absmaxes (fp32).

    A number is first rounded to one of 65,536 even steps, as the library does. A block of zeros
    has the byte of -1: times its absmax, it is zero.
    """
    x_MB, _ = _blocks(flat, block)
    absmax_M = x_MB.abs().amax(dim=1)
    scaled = (x_MB / absmax_M[:, None]).nan_to_num(nan=-1.0)
    index = ((scaled + 1.0) * 0.5 * 65_535.0 + 0.5).floor().clamp(0, 65_535).long()
    return _byte_of(flat.device)[index].flatten()[: len(flat)], absmax_M


def num_bytes(runs: Runs, num_elements: int) -> int:
    """Of such a part of a tensor of so many elements, quantised."""
    nested = math.ceil(math.ceil(num_elements / BLOCK) / NESTED_BLOCK)
    return runs.num * runs.num_blocks * (BLOCK // 2 + 1) + 4 * nested + 4
