"""What follows from all ranks' programs together: when messages are let go, and what is held.

Actions are those of `parallel.pipeline.program`. A message is named after the action that sends
it: ("SEND_F", chunk, micro-batch) or ("SEND_B", chunk, micro-batch).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Message = tuple[str, int, int]
Programs = Sequence[Sequence[Any]]


def _key(action: Any) -> Message:
    return action.computation_type.value, action.stage_index, action.microbatch_index


def _taken(kind: str, chunk: int, microbatch: int) -> Message:
    """The message that a forward or backward action waits for, if its sender is another rank."""
    if kind == "F":
        return "SEND_F", chunk - 1, microbatch
    return "SEND_B", chunk + 1, microbatch


def one_order(programs: Programs) -> list[tuple[int, int]]:
    """All actions as (rank, index), in an order in which one process could do them.

    It is the order of ranks that work in step, a forward or backward action each at a time, and
    that wait for what another has not sent before the step.
    """
    sent = {_key(a) for actions in programs for a in actions if _key(a)[0].startswith("SEND")}
    there: set[Message] = set()
    at = [0] * len(programs)
    order: list[tuple[int, int]] = []
    while len(order) < sum(map(len, programs)):
        before, found = len(order), set(there)
        for rank, actions in enumerate(programs):
            worked = False
            while at[rank] < len(actions):
                key = _key(actions[at[rank]])
                computes = key[0] in ("F", "B", "I", "W")
                waits = key[0] in ("F", "B", "I") and _taken(*key) in sent
                if computes and (worked or (waits and _taken(*key) not in there)):
                    break
                if key[0].startswith("SEND"):
                    found.add(key)
                worked |= computes
                order.append((rank, at[rank]))
                at[rank] += 1
        assert len(order) > before, "a pipeline program that waits for itself"
        there = found
    return order


def releases(programs: Programs, rank: int) -> dict[int, list[Message]]:
    """In front of which of a rank's actions it waits until which of its messages have left.

    A message is let go once its receiver has used it, in `one_order`. All that this adds to wait
    for lies earlier in that order, so no rank can wait for itself. The last messages, which
    nothing follows, are not named.
    """
    place = {where: i for i, where in enumerate(one_order(programs))}
    used = {
        _taken(*_key(a)): place[r, i]
        for r, actions in enumerate(programs)
        for i, a in enumerate(actions)
        if _key(a)[0] in ("F", "B", "I")
    }
    mine = [place[rank, i] for i in range(len(programs[rank]))]
    sends = [_key(a) for a in programs[rank] if _key(a)[0].startswith("SEND")]
    found: dict[int, list[Message]] = defaultdict(list)
    after = 0
    for when, message in sorted((used[m], m) for m in sends):
        while after < len(mine) and mine[after] < when:
            after += 1
        if after < len(mine):
            found[after].append(message)
    return found


def in_flight(
    actions: Iterable[Any], size: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """By chunk, of how many micro-batches a rank holds the activations at once.

    At the chunk's own worst moment, and when all chunks together hold the most: a micro-batch of a
    chunk counts its ``size``. A forward pass takes activations up; a backward pass lets them go, or
    the weights' half of one.
    """
    held, most, together = Counter[int](), Counter[int](), Counter[int]()
    worst = 0
    for kind, chunk, _ in map(_key, actions):
        if kind == "F":
            held[chunk] += 1
            most[chunk] = max(most[chunk], held[chunk])
            total = sum(size[c] * n for c, n in held.items())
            if total > worst:
                worst, together = total, held.copy()
        elif kind in ("B", "W"):
            held[chunk] -= 1
    return dict(most), dict(together)


def between_halves(actions: Iterable[Any], chunks: Sequence[int]) -> set[tuple[int, ...]]:
    """Of how many micro-batches of each chunk a split backward pass is half done: every case."""
    held: Counter[int] = Counter()
    found = set()
    for kind, chunk, _ in map(_key, actions):
        held[chunk] += {"I": 1, "W": -1}.get(kind, 0)
        found.add(tuple(held[c] for c in chunks))
    return found


def messages(programs: Programs, rank: int) -> tuple[int, dict[int, int]]:
    """How many activations and gradients between pipeline stages a rank holds at once.

    The most of the step; and by chunk, during the last of its gradients' passes.

    What it received lives until its gradient is sent or handed on, what it sent until it is let
    go (`releases`), and activations until their backward pass at least.
    """
    waits = releases(programs, rank)
    received = {k[1:] for k in map(_key, programs[rank]) if k[0] == "RECV_F"}
    sends = {k for k in map(_key, programs[rank]) if k[0].startswith("SEND")}
    live: set[Message] = set()
    most, last = 0, {}
    for i, action in enumerate(programs[rank]):
        for kind, chunk, microbatch in waits.get(i, ()):
            live.discard((kind, chunk, microbatch))
        kind, chunk, m = _key(action)
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
