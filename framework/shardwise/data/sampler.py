"""The order of samples (design decision 3): a pure function of (seed, name, position).

The stream of samples is one epoch after another; epoch ``e`` is a permutation keyed by
(seed, name, e). A step consumes the next positions of the stream, whatever the number of ranks,
workers or micro-batches, so the resume state is one integer.

The permutation of a large data set is a Feistel network on the smallest power of two that holds
it, with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): any
position in O(1) time and memory. A stored permutation would cost 8 bytes a sample and rank (8 GB
for 1e9), and numpy does not promise its `Generator.permutation` the same between versions. A small
data set, where a Feistel network shuffles poorly, is sorted by hashed keys instead.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardwise.errors import UserError

_NUM_ROUNDS = 8
_SORTED_BELOW = 1 << 12  # sizes up to here are shuffled by sorting (well under 1 ms, 32 KB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, *parts: str | int) -> int:
    """A 64-bit key of a seed and names; the same on every machine and version."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in (seed, *parts))
    return int(xxhash.xxh3_64_intdigest(text.encode()))


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): scrambles every bit; wraps on overflow."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A keyed bijection of [0, size), evaluated at any index without the others."""

    def __init__(self, size: int, key: int) -> None:
        start = np.uint64(key & (2**64 - 1))
        self.size = size
        self._table: NDArray[np.int64] | None = None
        if size <= _SORTED_BELOW:
            keys = mix64(start + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
            self._table = np.argsort(keys, kind="stable")
        else:
            bits = (size - 1).bit_length()
            low = bits // 2
            self._low = np.uint64(low)
            self._masks = (np.uint64((1 << bits - low) - 1), np.uint64((1 << low) - 1))
            self._keys = mix64(start + np.arange(1, _NUM_ROUNDS + 1, dtype=np.uint64) * _GOLDEN)

    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of ``index`` (int64, values in [0, size)), the same shape."""
        if self._table is not None:
            return self._table[index]
        x = self._encrypt(index.astype(np.uint64))
        # Following the cycle until it is back inside keeps the map a bijection of [0, size).
        while (outside := x >= self.size).any():
            x[outside] = self._encrypt(x[outside])
        return x.astype(np.int64)

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        halves = [x >> self._low, x & self._masks[1]]
        for i in range(_NUM_ROUNDS):
            side = i % 2
            halves[side] ^= mix64(halves[1 - side] ^ self._keys[i]) & self._masks[side]
        return halves[0] << self._low | halves[1]


@functools.lru_cache(maxsize=64)
def _epoch(size: int, seed: int, name: str, epoch: int) -> Permutation:
    return Permutation(size, stream_key(seed, name, "epoch", epoch))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """An endless, shuffled stream over ``num_samples`` samples; holds no state."""

    num_samples: int
    seed: int
    name: str = "train"
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"sampler {self.name!r}: there are no samples to draw from")

    def batch(self, position: int, size: int) -> NDArray[np.int64]:
        """int64 [size]: sample indices at stream positions [position, position + size)."""
        return self.at(np.arange(position, position + size, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices at any stream positions (int64, any order), the same shape."""
        epochs, index = np.divmod(positions, self.num_samples)
        if not self.shuffle:
            return index
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            permutation = _epoch(self.num_samples, self.seed, self.name, int(epoch))
            out[here] = permutation(index[here])
        return out
