"""What all ranks do in a step, and what follows from it: when messages are let go, what is held.

A message is named after the action that sends it: ("SEND_F", chunk, micro-batch) or ("SEND_B",
chunk, micro-batch).
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

# (kind, chunk, micro-batch), kinds as torch spells them: F, B or its halves I and W, SEND_F, ...
Action = tuple[str, int, int]
Message = tuple[str, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
    """By pipeline rank, its actions of a step. What follows is worked out once, when asked for."""

    actions: Sequence[Sequence[Action]]

    @functools.cached_property
    def order(self) -> list[tuple[int, int]]:
        """All actions as (rank, index), in an order in which one process could do them.

        It is the order of ranks that work in step, a forward or backward action each at a time,
        and that wait for what another has not sent before the step.
        """
        sent = {a for actions in self.actions for a in actions if a[0].startswith("SEND")}
        there: set[Message] = set()
        at = [0] * len(self.actions)
        order: list[tuple[int, int]] = []
        while len(order) < sum(map(len, self.actions)):
            before, found = len(order), set(there)
            for rank, actions in enumerate(self.actions):
                worked = False
                while at[rank] < len(actions):
                    action = actions[at[rank]]
                    computes = action[0] in ("F", "B", "I", "W")
                    waits = action[0] in ("F", "B", "I") and _taken(*action) in sent
                    if computes and (worked or (waits and _taken(*action) not in there)):
                        break
                    if action[0].startswith("SEND"):
                        found.add(action)
                    worked |= computes
                    order.append((rank, at[rank]))
                    at[rank] += 1
            assert len(order) > before, "a pipeline program that waits for itself"
            there = found
        return order

    @functools.cached_property
    def releases(self) -> list[dict[int, list[Message]]]:
        """By rank: in front of which of its actions it waits until which of its messages left.

        A message is let go once its receiver has used it, in `order`. All that this adds to wait
        for lies earlier in that order, so no rank can wait for itself. The last messages, which
        nothing follows, are not named.
        """
        place = {where: i for i, where in enumerate(self.order)}
        used = {
            _taken(*action): place[rank, i]
            for rank, actions in enumerate(self.actions)
            for i, action in enumerate(actions)
            if action[0] in ("F", "B", "I")
        }
        found: list[dict[int, list[Message]]] = []
        for rank, actions in enumerate(self.actions):
            waits: dict[int, list[Message]] = defaultdict(list)
            after = 0
            sends = (a for a in actions if a[0].startswith("SEND"))
            for when, message in sorted((used[m], m) for m in sends):
                while after < len(actions) and place[rank, after] < when:
                    after += 1
                if after < len(actions):
                    waits[after].append(message)
            found.append(waits)
        return found

    @functools.cached_property
    def messages(self) -> list[tuple[int, dict[int, int]]]:
        """By rank: how many activations and gradients between stages it holds at once.

        The most of the step; and by chunk, during the last of its gradients' passes.

        What it received lives until its gradient is sent or handed on, what it sent until it is
        let go (`releases`), and activations until their backward pass at least.
        """
        return [_held(*both) for both in zip(self.actions, self.releases, strict=True)]


def _taken(kind: str, chunk: int, microbatch: int) -> Message:
    """The message that a forward or backward action waits for, if its sender is another rank."""
    if kind == "F":
        return "SEND_F", chunk - 1, microbatch
    return "SEND_B", chunk + 1, microbatch


def in_flight(
    actions: Iterable[Action], size: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """By chunk, of how many micro-batches a rank holds the activations at once.

    At the chunk's own worst moment, and when all chunks together hold the most: a micro-batch of a
    chunk counts its ``size``. A forward pass takes activations up; a backward pass lets them go, or
    the weights' half of one.
    """
    held, most, together = Counter[int](), Counter[int](), Counter[int]()
    worst = 0
    for kind, chunk, _ in actions:
        if kind == "F":
            held[chunk] += 1
            most[chunk] = max(most[chunk], held[chunk])
            total = sum(size[c] * n for c, n in held.items())
            if total > worst:
                worst, together = total, held.copy()
        elif kind in ("B", "W"):
            held[chunk] -= 1
    return dict(most), dict(together)


def between_halves(actions: Iterable[Action], chunks: Sequence[int]) -> set[tuple[int, ...]]:
    """Of how many micro-batches of each chunk a split backward pass is half done: every case."""
    held: Counter[int] = Counter()
    found = set()
    for kind, chunk, _ in actions:
        held[chunk] += {"I": 1, "W": -1}.get(kind, 0)
        found.add(tuple(held[c] for c in chunks))
    return found


def _held(
    actions: Sequence[Action], waits: Mapping[int, list[Message]]
) -> tuple[int, dict[int, int]]:
    received = {a[1:] for a in actions if a[0] == "RECV_F"}
    sends = {a for a in actions if a[0].startswith("SEND")}
    live: set[Message] = set()
    most, last = 0, {}
    for i, (kind, chunk, m) in enumerate(actions):
        live.difference_update(waits.get(i, ()))
        if kind.startswith("RECV"):
            live.add((kind, chunk, m))
        elif kind == "F" and ("SEND_F", chunk, m) in sends:
            live |= {("SEND_F", chunk, m), ("output", chunk, m)}
        elif kind in ("B", "I") and (chunk, m) in received:
            live.add(("SEND_B", chunk, m))
        held = sum(k[0] != "output" or ("SEND_F", *k[1:]) not in live for k in live)
        most = max(most, held)
        if kind in ("B", "W"):
            last[chunk] = held
        if kind in ("B", "I"):
            live -= {("output", chunk, m), ("RECV_B", chunk, m)}
        elif kind == "SEND_B":
            live.discard(("RECV_F", chunk, m))
    return most, last
