"""Near duplicates: an exact join of sets by their Jaccard similarity.

Two sets that share a part ``t`` of their union share at least ``ceil(t * n)`` of the ``n`` elements
of each. So, in any order that both follow, the first ``n - ceil(t * n) + 1`` elements of one have
one in common with those of the other (prefix filtering; Bayardo, Ma and Srikant 2007). The order is
by rarity, so that what all texts say finds no candidates. No pair is missed, as some are by MinHash
with bands, and none is taken that is not near.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from shardwise.curation.words import jaccard

Parts = tuple[frozenset[int], ...]  # of the texts that are compared, each for itself


class NearIndex:
    """Texts by their shingles, and which of them are near another."""

    def __init__(self, rarity: Mapping[int, int], threshold: float) -> None:
        """``rarity``: in how many texts a shingle stands; ``threshold``: of Jaccard, above 0."""
        self.rarity, self.threshold = rarity, threshold
        self._parts: dict[int, Parts] = {}
        self._starts: dict[int, list[int]] = defaultdict(list)

    def _prefix(self, parts: Parts) -> list[int]:
        every = sorted(frozenset().union(*parts), key=lambda s: (self.rarity.get(s, 0), s))
        # Not one too many, where a product such as 0.7 * 10 is a hair above a whole number.
        shared = math.ceil(self.threshold * len(every) - 1e-9)
        return every[: len(every) - shared + 1]

    def add(self, name: int, parts: Parts) -> None:
        """A text that others may be near."""
        self._parts[name] = parts
        for shingle in self._prefix(parts):
            self._starts[shingle].append(name)

    def near(self, parts: Parts) -> Iterator[int]:
        """The names of those that are near in each of their parts, each once.

        If each part is, so is their union (a mediant lies between its fractions): that is what
        finds the candidates.
        """
        found = (name for shingle in self._prefix(parts) for name in self._starts.get(shingle, ()))
        for name in dict.fromkeys(found):
            pairs = zip(parts, self._parts[name], strict=True)
            if all(jaccard(a, b) >= self.threshold for a, b in pairs):
                yield name
