"""Counter-based random numbers: a pure function of keys, the same on every device and layout.

A *key* is 63 bits that name one random event ("the dropout of token 7 of sample 1234 in step 3").
Keys are built by hashing names on the host (`key`) and by integer mixing on tensors (`fold`), and
turned into numbers by `bits` and `uniform`. No state exists, so nothing has to be resumed, and a
rank that computes a slice of a tensor draws exactly that slice of the global numbers.

The mixing is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators", section 5), on int64 tensors: multiplication wraps modulo 2**64,
and right shifts are made logical by masking off the copied sign bits.
"""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

# Shape suffixes: B sequences, T tokens.

_SIGN = 1 << 63
_WORD = 1 << 64


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the non-negative ``value``."""
    value %= _WORD
    return value - _WORD if value >= _SIGN else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def key(seed: int, *parts: str | int) -> int:
    """A 63-bit key from a seed and any number of names and integers.

    The parts are hashed by xxh3 with their type and length, so ``("ab", "c")`` and ``("a", "bc")``
    differ, as do ``1`` and ``"1"``. Stable across machines and versions.
    """
    text = b"".join(_encode(part) for part in (seed, *parts))
    return xxhash.xxh3_64_intdigest(text) & (_SIGN - 1)


def _encode(part: str | int) -> bytes:
    kind, body = ("s", part) if isinstance(part, str) else ("i", str(int(part)))
    raw = body.encode()
    return f"{kind}{len(raw)}:".encode() + raw


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64: each input bit flips half the output bits."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, num_bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def fold(keys: Tensor, index: Tensor | int) -> Tensor:
    """New keys from ``keys`` and an index (int64, broadcast): one draw per index.

    ``fold(fold(k, a), b)`` and ``fold(fold(k, b), a)`` are unrelated.
    """
    return (
        mix(keys + (index + 1) * _GOLDEN)
        if isinstance(index, Tensor)
        else mix(keys + _signed((index + 1) * _GOLDEN))
    )


def token_keys(
    seed: int, step: int, stage_name: str, sample_ids_B: Tensor, position_index_T: Tensor
) -> Tensor:
    """Keys (int64, BT) of every token of a micro-batch.

    ``sample_ids_B`` are global sample indices and ``position_index_T`` indices within the row
    (not positions within a packed document, which repeat).
    """
    base = key(seed, "token", step, stage_name)
    rows_B = fold(torch.full_like(sample_ids_B, base), sample_ids_B)
    return fold(rows_B[:, None], position_index_T[None, :])


def bits(keys: Tensor, num_bits: int) -> Tensor:
    """The top ``num_bits`` (1 to 63) random bits of each key, as a non-negative int64."""
    return _shift(mix(keys), 64 - num_bits)


def uniform(keys: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in the open interval (0, 1), float32 (23 bits) or float64 (52 bits).

    Half a step is added so that neither 0 nor 1 occurs: the logarithm of a draw is finite.
    """
    num_bits = 52 if dtype == torch.float64 else 23
    return (bits(keys, num_bits).to(dtype) + 0.5) * 2.0**-num_bits
