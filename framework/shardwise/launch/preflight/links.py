"""How fast ranks sum over each link: within every node, and between pairs of nodes.

A link has a group of its own beside torch's world: a broken one fails alone. Between two nodes,
rank i of one sums with rank i of the other, for all i at once, as rings and data ranks do.
Bandwidth is nccl-tests' bus bandwidth: 2 (n - 1) / n times the bytes, by the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from shardwise.launch.preflight.board import Board, Deadline, Place
from shardwise.parallel.mesh import pick_device

MAX_PARTNERS = 8  # other nodes that a node is measured with, at most
_MIB = 1 << 20
_MAX_MIB = {"cpu": 64, "cuda": 256}
_SECONDS = 0.1  # how long a sum of the final size should take
_TIMES = 3  # of which the fastest counts
_LINK_TIMEOUT_S = 5.0


def rounds(nodes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Pairs of nodes, so that none is in two pairs of a round (the circle method of tournaments).

    Of more than eight nodes, eight rounds, spread evenly over all.
    """
    ring: list[int | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    count = len(ring) - 1
    chosen = {r * count // min(count, MAX_PARTNERS) for r in range(min(count, MAX_PARTNERS))}
    for number in range(count):
        if number in chosen:
            half = zip(ring[: len(ring) // 2], reversed(ring[len(ring) // 2 :]))
            yield [(min(a, b), max(a, b)) for a, b in half if a is not None and b is not None]
        ring[1:] = [ring[-1], *ring[1:-1]]


def measure(
    place: Place, board: Board, seconds: float, nodes: dict[str, list[int]], device: str
) -> list[dict[str, Any]]:
    """This rank's links: ``{"nodes", "rail", "round", "gb_s", "error"}``, told by the lowest rank.

    Args:
        place: of this rank.
        board: whose store the groups meet in.
        seconds: for all of it.
        nodes: ranks by node (text, as JSON has it), in the order of their local ranks.
        device: ``engine.device`` of the recipe.
    """
    where = pick_device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # this is a thread of its own
    deadline = Deadline(seconds)
    teams = {int(node): ranks for node, ranks in nodes.items()}
    plan = [(0, [place.node], teams[place.node])]
    for number, pairs in enumerate(rounds(sorted(teams)), 1):
        for pair in pairs:
            rail = [teams[node][place.local_rank : place.local_rank + 1] for node in pair]
            if place.node in pair and all(rail):
                plan.append((number, list(pair), [*rail[0], *rail[1]]))
    found = []
    for number, pair_or_node, ranks in plan:
        if len(ranks) < 2:
            continue
        link = {"nodes": pair_or_node, "rail": place.local_rank, "round": number, "error": ""}
        try:
            gb_s = bandwidth(board.store, number, ranks, place.rank, where, deadline)
        except (RuntimeError, TimeoutError) as error:
            link |= {"gb_s": None, "error": str(error).splitlines()[0]}
            found.append(link)
            continue
        if place.rank == min(ranks):
            found.append(link | {"gb_s": gb_s})
    return found


def bandwidth(
    store: Any, number: int, ranks: list[int], me: int, device: torch.device, deadline: Deadline
) -> float:
    """Bus bandwidth in GB/s (1e9 bytes) of an all-reduce over ``ranks``.

    Raises RuntimeError or TimeoutError when the others do not come.
    """
    name = f"preflight/link/{number}/{'-'.join(map(str, ranks))}"
    patience = timedelta(seconds=max(0.1, deadline.left(_LINK_TIMEOUT_S)))
    arguments = PrefixStore(name, store), ranks.index(me), len(ranks)
    group: dist.ProcessGroupNCCL | dist.ProcessGroupGloo
    if device.type == "cuda":  # GPU only: never run on this project's CPUs
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        group = dist.ProcessGroupNCCL(*arguments, options)
    else:
        group = dist.ProcessGroupGloo(*arguments, timeout=patience)
    small = torch.zeros(_MIB // 4, device=device)
    reduce(group, small, patience)  # connects
    spent = torch.tensor([reduce(group, small, patience)], device=device)
    reduce(group, spent, patience)  # all choose one size
    mib = int(_SECONDS / (float(spent) / len(ranks)))
    values = torch.zeros(_MIB // 4 * max(1, min(mib, _MAX_MIB[device.type])), device=device)
    best = min(reduce(group, values, patience) for _ in range(_TIMES))
    return 2 * (len(ranks) - 1) / len(ranks) * values.nbytes / best / 1e9


def reduce(group: Any, values: torch.Tensor, patience: timedelta) -> float:
    """Sum over the group, in place; the seconds that it took here."""
    began = time.perf_counter()
    work = group.allreduce([values])
    if values.is_cuda:  # its wait() is of the stream only
        done = torch.cuda.Event()
        work.wait()
        done.record()
        while not done.query():
            if time.perf_counter() - began > patience.total_seconds():
                raise TimeoutError("NCCL: the others did not come")
            time.sleep(1e-4)
    else:
        work.wait(patience)
    return time.perf_counter() - began
