"""Which sequences are in flight, and whose keys and values are in the cache. No tensors here.

Sequences start in the order of their numbers, as slots and pages are free. Where pages run out,
what is cached is given up: of those that ended and are held, then of prompts that wait, then of
those in flight that came last. Their tokens stay, and are computed again when they go on: nothing
is lost, and the first in flight always has room.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from shardwise.rollout.engine import RolloutCounts
from shardwise.rollout.pages import Cached, PagePool
from shardwise.rollout.sequences import Drawing, Group


class Scheduler:
    """Sequences by number: waiting for a slot, in flight, or ended and held."""

    def __init__(self, pool: PagePool, num_slots: int, counts: RolloutCounts) -> None:
        self.pool, self.num_slots, self.counts = pool, num_slots, counts
        self.waiting: list[tuple[int, Drawing]] = []  # a heap
        self.running: dict[int, Drawing] = {}  # by number, ascending
        self.held: dict[int, Drawing] = {}  # in the order in which they ended

    def add(self, sequence: Drawing) -> None:
        """Queue a new sequence."""
        sequence.group.waiting.add(sequence.number)
        heapq.heappush(self.waiting, (sequence.number, sequence))

    def all(self) -> Iterator[Drawing]:
        """Every sequence that there is, by state."""
        yield from self.running.values()
        yield from (sequence for _, sequence in self.waiting)
        yield from self.held.values()

    def groups(self) -> list[Group]:
        """Every prompt that is, or may be, cached."""
        return list({id(s.group): s.group for s in self.all()}.values())

    # --- states -----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Let the first of those that wait be in flight, as many as there is room for."""
        promised = 0
        counted: set[int] = set()  # groups whose prompt is
        while self.waiting and len(self.running) < self.num_slots:
            number, sequence = self.waiting[0]
            group, limit = sequence.group, self.pool.max_pages
            need = self.pool.pages_of(len(sequence.tokens) + 1)
            if id(group) in counted:
                need -= len(group.tokens) // self.pool.page_size
            elif group.table:
                need -= len(group.table) - 1
            while limit is not None and promised + need > limit - self.pool.num_used:
                if not self._forget_idle(number):
                    break
            else:
                promised += need
                counted.add(id(group))
                heapq.heappop(self.waiting)
                self.running[number] = sequence
                continue
            if self.running:
                return
            # Alone it has room, which was made sure of at its submission.
            heapq.heappop(self.waiting)
            self.running[number] = sequence

    def end(self, sequence: Drawing) -> None:
        """A sequence draws no more."""
        self._leave(sequence)
        if sequence.hold:
            self.held[sequence.number] = sequence
        else:
            self.pool.release(sequence)

    def remove(self, number: int) -> None:
        """Forget a sequence, whatever it does; one that is not there is forgotten already."""
        found = self.held.pop(number, None)
        found = found or next((s for s in self.all() if s.number == number), None)
        if found is not None:
            self._leave(found)
            self.pool.release(found)

    def _leave(self, sequence: Drawing) -> None:
        if self.running.pop(sequence.number, None) is None:
            self.waiting = [(n, s) for n, s in self.waiting if s is not sequence]
            heapq.heapify(self.waiting)
        sequence.logits_V = None
        self._started(sequence)

    def forget_all(self) -> None:
        """Nothing that is cached may be read again; all that go on are computed anew."""
        for sequence in self.all():
            self._forget(sequence)
        for group in self.groups():
            self._forget_prompt(group)

    # --- pages ------------------------------------------------------------------------------------

    def prompts(self) -> list[Group]:
        """Prompts that several sequences wait for, one of them in flight, with pages for them."""
        found: list[Group] = []
        for sequence in list(self.running.values()):
            group = sequence.group
            alone = len(group.waiting) == 1
            if sequence.length or alone or group.length == len(group.tokens) or group in found:
                continue
            if self._make_room(group, min(group.waiting)):
                found.append(group)
            else:
                for number in group.waiting & self.running.keys():
                    self._preempt(self.running[number])
        return found

    def start(self) -> None:
        """Let sequences in flight that have nothing cached go on from their prompt."""
        for sequence in self.running.values():
            group = sequence.group
            if sequence.length or sequence.number not in group.waiting:
                continue
            if group.length:
                self.pool.share(group, sequence, group.length)
                self.counts.shared += group.length
                if len(sequence.tokens) == group.length:
                    sequence.logits_V = group.logits_V
            self._started(sequence)

    def ready(self) -> list[Drawing]:
        """Sequences in flight, each with pages for all of its tokens."""
        for sequence in list(self.running.values()):
            if sequence.number not in self.running:  # it made room for an earlier one
                continue
            if sequence.logits_V is None and not self._make_room(sequence, sequence.number):
                self._preempt(sequence)
        return list(self.running.values())

    def _make_room(self, item: Cached, number: int) -> bool:
        """Pages for an item's tokens; False: those that came before ``number`` have them all."""
        while (need := self.pool.missing(item)) > len(self.pool.free):
            if not (self._grow(need) or self._give_up(item, number)):
                return False
        if need:
            self.pool.extend(item)
        return True

    def _grow(self, need: int) -> bool:
        """More pages, if there may be: for all that is in flight, to its end."""
        pool = self.pool
        rest = sum(
            pool.pages_of(len(s.group.tokens) + s.limit) - len(s.table)
            for s in self.running.values()
        )
        size = len(pool.holders)
        pool.grow(max(size + need - len(pool.free), pool.num_used + rest + 1, size * 5 // 4))
        return len(pool.holders) > size

    def _give_up(self, item: Cached, number: int) -> bool:
        """Make room by what is needed last; False: there is nothing."""
        if self._forget_idle(number, item):
            return True
        last = next(reversed(self.running.values()), None)
        if last is None or last.number <= number:
            return False
        self._preempt(last)
        return True

    def _forget_idle(self, number: int, but: Cached | None = None) -> bool:
        """Give up what no sequence in flight goes on from, of later ones than ``number``."""
        for sequence in self.held.values():
            if sequence.table:
                self._forget(sequence)
                return True
        for _, sequence in sorted(self.waiting, reverse=True):
            group = sequence.group
            if group.table and group is not but and min(group.waiting) > number:
                self._forget_prompt(group)
                return True
        return False

    def _preempt(self, sequence: Drawing) -> None:
        del self.running[sequence.number]
        self._forget(sequence)
        heapq.heappush(self.waiting, (sequence.number, sequence))

    def _forget(self, sequence: Drawing) -> None:
        self.pool.release(sequence)
        sequence.logits_V = None
        if sequence.number not in self.held:
            sequence.group.waiting.add(sequence.number)

    def _forget_prompt(self, group: Group) -> None:
        self.pool.release(group)
        group.logits_V = None

    def _started(self, sequence: Drawing) -> None:
        """A sequence needs its prompt no more."""
        group = sequence.group
        group.waiting.discard(sequence.number)
        if not group.waiting:
            self._forget_prompt(group)
