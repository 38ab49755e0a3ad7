"""How alike two texts are: normal forms, shingles, Jaccard, edit distance."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable, Sequence

import xxhash

# Scripts without spaces between words: each character is one.
_ALONE = "\u0e00-\u0eff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+|[^\w\s]")
_ASCII_TOKEN = re.compile(r"\w+|[^\w\s]")


def tokens(text: str) -> list[str]:
    """Words and single symbols, in one spelling (NFKC) and without case.

    ``2+2`` and ``2 + 2`` are the same, ``2-2`` is not: symbols are what mathematics and code say.
    """
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def words(text: str) -> list[str]:
    """The tokens without punctuation and symbols."""
    return [t for t in tokens(text) if t[0].isalnum() or t[0] == "_"]


def normal(text: str) -> str:
    """A text that two texts share if their tokens are the same."""
    return " ".join(tokens(text))


def ngrams(given: Sequence[str], n: int) -> frozenset[int]:
    """64-bit hashes of the runs of ``n`` words; a shorter text has none."""
    return frozenset(_hash(" ".join(given[i : i + n])) for i in range(len(given) - n + 1))


def shingles(given: Sequence[str], n: int, tag: str = "") -> frozenset[int]:
    """64-bit hashes of the runs of ``n`` tokens, or of all if there are fewer (of none: empty).

    ``tag``: keeps those of one text apart from another's.
    """
    if not given:
        return frozenset()
    last = max(len(given) - n, 0)
    return frozenset(_hash(f"{tag}\0{' '.join(given[i : i + n])}") for i in range(last + 1))


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Shared elements over all of them, from 0 to 1; of two empty sets 1."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def edit_distance(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Insertions, deletions and replacements that make one sequence the other (Levenshtein).

    A column of the table is a number of ``len(a)`` bits (Myers 1999, in Hyyrö's form).
    """
    if not a:
        return len(b)
    at: dict[Hashable, int] = {}
    for i, item in enumerate(a):
        at[item] = at.get(item, 0) | 1 << i
    every, top = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = every, 0, len(a)
    for item in b:
        same = at.get(item, 0)
        vertical = same | down
        horizontal = (((same & up) + up) ^ up) | same
        right = down | (every & ~(horizontal | up))
        left = up & horizontal
        distance += bool(right & top) - bool(left & top)
        right, left = right << 1 | 1, left << 1
        up = (left | ~(vertical | right)) & every
        down = right & vertical & every
    return distance


def distance(a: Sequence[str], b: Sequence[str]) -> float:
    """Edit distance over the longer one's length, from 0 (equal) to 1."""
    return edit_distance(a, b) / max(len(a), len(b), 1)
