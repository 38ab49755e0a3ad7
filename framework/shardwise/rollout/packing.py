"""Weights in the order in which `decode.cpp` reads them, in as few pages of memory as there can be.

Shape suffixes: O outputs and I inputs of a linear layer, F features of a feed-forward.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

_HUGE = 1 << 21  # bytes of a huge page of x86


def up32(size: int) -> int:
    """The next multiple of 32."""
    return (size + 31) // 32 * 32


def pack(weight_OI: Tensor) -> Tensor:
    """A linear weight in the order in which `block` of decode.cpp reads it.

    Panels of 32 outputs, both sizes padded with zeros to multiples of 32: fp32 (panel, I, 32);
    bf16 as AMX tiles (panel, I / 32, half, 16 pairs, 16 outputs of 2).
    """
    num_out, num_in = weight_OI.shape
    padded = weight_OI.new_zeros(up32(num_out), up32(num_in))
    padded[:num_out, :num_in] = weight_OI
    if weight_OI.dtype == torch.bfloat16:  # moved as pairs, as whole words
        tiles = padded.view(torch.int32).view(-1, 2, 16, padded.shape[1] // 32, 16)
        return tiles.permute(0, 3, 1, 4, 2).contiguous().view(torch.bfloat16)
    return padded.view(-1, 32, padded.shape[1]).mT.contiguous()


def unpack(packed: Tensor, num_out: int, num_in: int) -> Tensor:
    """The inverse of `pack`."""
    if packed.dtype == torch.bfloat16:
        panels, tiles = packed.shape[:2]
        words = packed.view(torch.int32).permute(0, 2, 4, 1, 3)
        padded = words.reshape(panels * 32, tiles * 16).view(torch.bfloat16)
    else:
        padded = packed.mT.reshape(-1, packed.shape[1])
    return padded[:num_out, :num_in]


def zip16(gate_FI: Tensor, up_FI: Tensor) -> Tensor:
    """16 rows of one, then 16 rows of the other; both padded to multiples of 32."""
    num_rows = len(gate_FI)
    padded = [F.pad(t, (0, 0, 0, up32(num_rows) - num_rows)) for t in (gate_FI, up_FI)]
    return torch.stack([t.unflatten(0, (-1, 16)) for t in padded], dim=1).flatten(0, 2)


def unzip16(both: Tensor, num_rows: int) -> list[Tensor]:
    """The inverse of `zip16`."""
    halves = both.unflatten(0, (-1, 2, 16)).unbind(1)
    return [half.flatten(0, 1)[:num_rows] for half in halves]


def bf16_holds(tensors: Iterable[Tensor]) -> bool:
    """Whether bf16 holds all their numbers exactly, as of a model that was stored in it."""
    return all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in tensors)


def in_huge_pages(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Copies side by side in huge pages, where the system has them; small ones stay as they are.

    A step of decoding reads all weights once. With pages of 4 KiB a core looks up the place of one
    in every 64 lines that it reads, and what is fetched ahead waits for that: a product of 16 rows
    took a tenth longer.
    """
    found = dict(tensors)
    sizes = {k: t.nbytes for k, t in tensors.items() if t is not None and t.nbytes % 64 == 0}
    total = sum(sizes.values())
    if total < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return found
    memory = mmap.mmap(-1, total + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    at = -whole.data_ptr() % _HUGE
    for name, size in sizes.items():
        old = tensors[name]
        assert old is not None
        found[name] = whole[at : at + size].view(old.dtype).view(old.shape).copy_(old)
        at += size
    return found
