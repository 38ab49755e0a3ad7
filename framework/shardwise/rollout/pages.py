"""Who holds which page of the cache. Numbers alone: the tensors are in `cache.py`.

A page has room for the keys and values of a few tokens. What a sequence has cached is a list of
pages, its table: token t stands in page ``table[t // page_size]``. Sequences that begin alike hold
the same pages; one that writes where others read gets a copy of its own first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(eq=False)
class Cached:
    """Tokens, of which the first ``length`` are in the pages of ``table``."""

    tokens: list[int]
    table: list[int] = dataclasses.field(default_factory=list)
    length: int = 0

    @property
    def pending(self) -> list[int]:
        """The tokens that are not in the cache."""
        return self.tokens[self.length :]


class PagePool:
    """Pages with the number of their holders, and those that nobody holds.

    ``copy(source, target)`` and ``clear(page)`` are called as soon as the content of pages is to
    change; ``resize(num_pages)`` when there are to be more. ``max_pages`` None: as many as asked
    for.
    """

    def __init__(
        self,
        page_size: int,
        max_pages: int | None,
        resize: Callable[[int], None],
        copy: Callable[[int, int], None],
        clear: Callable[[int], None],
    ) -> None:
        self.page_size, self.max_pages = page_size, max_pages
        self._resize, self._copy, self._clear = resize, copy, clear
        self.holders: list[int] = []
        self.free: list[int] = []

    @property
    def num_used(self) -> int:
        """Pages that somebody holds."""
        return len(self.holders) - len(self.free)

    def pages_of(self, num_tokens: int) -> int:
        """Pages that so many tokens fill."""
        return -(-num_tokens // self.page_size)

    def grow(self, num_pages: int) -> None:
        """Have room for this many pages, or as many as there may be."""
        if self.max_pages is not None:
            num_pages = min(num_pages, self.max_pages)
        more = range(len(self.holders), num_pages)
        if more:
            self._resize(num_pages)
            self.holders += [0] * len(more)
            self.free += reversed(more)

    def missing(self, item: Cached) -> int:
        """Pages that must be free for `extend`."""
        return self.pages_of(len(item.tokens)) - len(item.table) + self._shares_last(item)

    def extend(self, item: Cached) -> None:
        """Give an item pages for all its tokens, its own from the first that is not cached."""
        if self._shares_last(item):
            page = self._take()
            self._copy(item.table[-1], page)
            self._drop(item.table[-1])
            item.table[-1] = page
        while len(item.table) < self.pages_of(len(item.tokens)):
            page = self._take()
            self._clear(page)
            item.table.append(page)

    def share(self, giver: Cached, taker: Cached, length: int) -> None:
        """Let ``taker``, which has nothing cached, hold the pages of the giver's first tokens."""
        assert not taker.table and length <= giver.length
        taker.table = giver.table[: self.pages_of(length)]
        taker.length = length
        for page in taker.table:
            self.holders[page] += 1

    def release(self, item: Cached) -> None:
        """Nothing of an item is cached any more."""
        for page in item.table:
            self._drop(page)
        item.table, item.length = [], 0

    def _shares_last(self, item: Cached) -> bool:
        """Whether others hold the page that an item would write to next."""
        # A page behind the last cached token is never shared: `share` hands out no other.
        return item.length % self.page_size != 0 and self.holders[item.table[-1]] > 1

    def _take(self) -> int:
        page = self.free.pop()
        self.holders[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self.holders[page] -= 1
        if not self.holders[page]:
            self.free.append(page)
