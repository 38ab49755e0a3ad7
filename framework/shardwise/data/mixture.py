"""Weighted mixtures of sources: which source, and which of its samples, at each stream position.

The schedule is a binary tree over the sources. A node of which a share ``q`` belongs to its left
child has sent ``left(n) = floor(n * q + 1/2)`` of its first ``n`` draws there: draw ``n`` goes left
exactly when ``left(n + 1) > left(n)``, and becomes the left child's draw number ``left(n)``, else
the right child's draw number ``n - left(n)``. At a leaf that number is how many samples of this
source came before, which is the position in the source's own sampler. So any position costs one
walk down the tree: no replay from 0, no state but the position.

Error bound: a node is off its exact share by at most 1/2 of its own plus its share of its parent's
error; with the tree as flat as it can be, after any n draws every source is within
``ceil(log2(num_sources)) / 2`` of ``weight * n`` (1/2 for two sources, 1 for up to four), and
strictly within 1 for up to four. Arithmetic is exact (Python integers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shardwise.data.sampler import Sampler
from shardwise.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Node:
    left: _Node | int  # an int is a leaf: the number of the source
    right: _Node | int
    numerator: int  # the left child's share of this node's draws
    denominator: int

    def num_left(self, n: int) -> int:
        return (2 * n * self.numerator + self.denominator) // (2 * self.denominator)


def _tree(sources: Sequence[int], weights: Sequence[Fraction]) -> _Node | int:
    if len(sources) == 1:
        return sources[0]
    half = len(sources) // 2
    share = sum((weights[i] for i in sources[:half]), Fraction(0))
    share /= sum((weights[i] for i in sources), Fraction(0))
    left, right = _tree(sources[:half], weights), _tree(sources[half:], weights)
    return _Node(left, right, share.numerator, share.denominator)


class Schedule:
    """Stream position -> (source, position within that source), for positive ``weights``."""

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(w > 0 and np.isfinite(w) for w in weights):
            raise UserError(f"mixture weights must be positive and finite, not {list(weights)}")
        self._root = _tree(range(len(weights)), [Fraction(w) for w in weights])

    def at(self, position: int) -> tuple[int, int]:
        """The source drawn at ``position``, and how many of its draws came before."""
        node, n = self._root, position
        while isinstance(node, _Node):
            before = node.num_left(n)
            if node.num_left(n + 1) > before:
                node, n = node.left, before
            else:
                node, n = node.right, n - before
        return node, n


class MixtureSampler:
    """Like `Sampler`, over the concatenation of several sources drawn by weight.

    A sample index is the source's offset in the concatenation plus the index within it. Each source
    has its own epochs and shuffling.
    """

    def __init__(
        self, num_samples: Sequence[int], weights: Sequence[float], seed: int, name: str = "train"
    ) -> None:
        if len(num_samples) != len(weights):
            raise UserError(f"{len(num_samples)} sources but {len(weights)} weights")
        self._schedule = Schedule(weights)
        self._offsets = np.cumsum([0, *num_samples])
        self.num_samples = int(self._offsets[-1])
        self._samplers = [Sampler(n, seed, f"{name}/{i}") for i, n in enumerate(num_samples)]

    def batch(self, position: int, size: int) -> NDArray[np.int64]:
        """int64 [size]: sample indices at stream positions [position, position + size)."""
        return self.at(np.arange(position, position + size, dtype=np.int64))

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample indices at any stream positions (int64, 1-D)."""
        drawn = [self._schedule.at(int(p)) for p in positions]
        sources, inner = np.array(drawn, dtype=np.int64).reshape(-1, 2).T
        out = np.empty_like(inner)
        for i in np.unique(sources):
            here = sources == i
            out[here] = self._offsets[i] + self._samplers[int(i)].at(inner[here])
        return out
