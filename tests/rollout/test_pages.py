"""Pages: each held as often as it is in tables, none lost, and none written that others read."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.rollout.pages import Cached, PagePool


class Store:
    """What pages hold, token by token, beside the pool that hands them out."""

    def __init__(self, page_size: int, num_pages: int) -> None:
        self.pages: list[list[int | None]] = []
        self.size = page_size
        self.pool = PagePool(page_size, num_pages, self.resize, self.copy, self.clear)
        self.pool.grow(num_pages)

    def resize(self, num_pages: int) -> None:
        self.pages += [[None] * self.size for _ in range(num_pages - len(self.pages))]

    def copy(self, source: int, target: int) -> None:
        self.pages[target] = list(self.pages[source])

    def clear(self, page: int) -> None:
        self.pages[page] = [None] * self.size

    def compute(self, item: Cached) -> None:
        """As a forward pass: what is pending is written."""
        for i in range(item.length, len(item.tokens)):
            self.pages[item.table[i // self.size]][i % self.size] = item.tokens[i]
        item.length = len(item.tokens)

    def read(self, item: Cached) -> list[int | None]:
        return [self.pages[item.table[i // self.size]][i % self.size] for i in range(item.length)]


@given(st.integers(1, 5), st.data())
@settings(max_examples=150, deadline=None)
def test_everybody_reads_what_they_wrote(page_size: int, data: st.DataObject) -> None:
    store, items, word = Store(page_size, 24), [], 0
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["new", "extend", "share", "release"]))
        if action == "new" or not items:
            items.append(Cached([]))
        item = data.draw(st.sampled_from(items))
        if action == "extend":
            before = len(item.tokens)
            item.tokens += range(word, word + data.draw(st.integers(1, 7)))
            word += 100
            if store.pool.missing(item) <= len(store.pool.free):
                store.pool.extend(item)
                store.compute(item)
            else:
                del item.tokens[before:]
        elif action == "share":
            length = data.draw(st.integers(0, item.length))
            items.append(Cached(item.tokens[:length]))
            store.pool.share(item, items[-1], length)
        elif action == "release":
            store.pool.release(item)
            items.remove(item)
        for some in items:
            assert store.read(some) == some.tokens
        held = Counter(page for some in items for page in some.table)
        assert store.pool.holders == [held[page] for page in range(24)]
        assert sorted(store.pool.free) == [page for page in range(24) if not held[page]]


def test_there_are_no_more_pages_than_allowed() -> None:
    store = Store(4, 3)
    store.pool.grow(9)
    assert len(store.pages) == 3 and store.pool.num_used == 0
