"""`shardwise doctor --cluster`: rank 0 asks, all answer, rank 0 judges and tells."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from shardwise import terminal
from shardwise.errors import CheckFailed
from shardwise.launch.local import launch_local
from shardwise.launch.preflight import folder, links, node
from shardwise.launch.preflight.board import Board, Deadline, Place, Step
from shardwise.launch.preflight.judge import Problem, Seen, judge

SECONDS = 30.0  # for all of it, once the ranks are there
# At most, of those seconds: to appear, to look around, to look at the folder, for the links.
_HERE, _FACTS, _FOLDER, _LINKS = 0.4, 0.35, 0.2, 0.4
_PINGS = 3


def cluster(
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    seconds: float = SECONDS,
    min_gb_s: float = 0.0,
) -> dict[str, Any]:
    """Look at every node before a run; under torchrun this process is one rank of it.

    Otherwise ``nproc`` ranks are started on this machine (None or 1: this process alone).

    Returns what was found, on rank 0: ``{"ok", "bad_input", "seconds", "world", "nodes", "clocks",
    "links", "failures", "warnings"}`` (bad input: a recipe that no node takes); elsewhere
    ``{"ok"}``. Raises CheckFailed when rank 0 does not answer.
    """
    given = str(recipe) if isinstance(recipe, Path) else recipe
    if (nproc or 1) == 1 or "RANK" in os.environ:
        return rank(given, overrides, seconds, min_gb_s)
    with tempfile.TemporaryDirectory(prefix="shardwise-doctor-") as logs:
        result = Path(logs, "result.json")
        target = f"{__name__}:{local_rank.__name__}"
        words = [given, list(overrides), seconds, min_gb_s, str(result)]
        launch_local(target, words, nproc or 1, Path(logs))
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def local_rank(recipe: Any, overrides: list[str], seconds: float, floor: float, to: str) -> None:
    """One rank of a local launch; rank 0 writes the result."""
    found = rank(recipe, overrides, seconds, floor)
    if os.environ["RANK"] == "0":
        Path(to).write_text(json.dumps(found))


def rank(
    recipe: Any, overrides: Sequence[str], seconds: float = SECONDS, min_gb_s: float = 0.0
) -> dict[str, Any]:
    """Be one rank; see `cluster`."""
    place = Place.here()
    if place.world == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
    else:
        try:
            patience = timedelta(seconds=seconds)
            store, _, _ = next(iter(rendezvous("env://", timeout=patience)))
        except (RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise CheckFailed(
                f"{place.host}: no store at {address} within {seconds:.0f} s; is the first node "
                f"up, and does it take connections on that port? ({str(error).splitlines()[0]})"
            ) from None
    return join(store, place, recipe, overrides, seconds, min_gb_s)


def join(
    store: Any,
    place: Place,
    recipe: Any,
    overrides: Sequence[str],
    seconds: float = SECONDS,
    min_gb_s: float = 0.0,
) -> dict[str, Any]:
    """Answer rank 0 over ``store``, or be rank 0. Returns and raises as `cluster` does."""
    steps: dict[str, Step] = {
        "here": here,
        "facts": functools.partial(node.facts, recipe=recipe, overrides=overrides),  # its own words
        "sign": folder.sign,
        "look": folder.look,
        "clean": folder.clean,
        "clocks": clocks,
        "links": links.measure,
    }
    board = Board(store, place, steps)
    if place.rank == 0:
        began = time.monotonic()
        seen = ask(board, seconds)
        seen.min_gb_s = min_gb_s
        found = result(seen, judge(seen), time.monotonic() - began)
        board.end({"ok": found["ok"]})
        return found
    try:
        verdict: dict[str, Any] = board.serve()
    except (TimeoutError, RuntimeError) as error:
        raise CheckFailed(
            f"rank {place.rank} on {place.host}: rank 0 does not answer any more; see its node's "
            f"log ({str(error).splitlines()[0]})"
        ) from None
    return verdict


def ask(board: Board, seconds: float) -> Seen:
    """Put every question, within so many seconds."""
    deadline = Deadline(seconds)
    world, local = board.place.world, board.place.local_world
    answers = board.ask("here", range(world), deadline.left(_HERE * seconds))
    places = {r: Place(**a.value) for r, a in answers.items()}
    ranks: dict[int, list[int]] = {}
    for r in range(world):  # of a rank that is not here: where it would be if all nodes were alike
        ranks.setdefault(places[r].node if r in places else r // local, []).append(r)
    heads = {n: next((r for r in rs if r in places), rs[0]) for n, rs in ranks.items()}
    seen = Seen(_names({n: places[r].host for n, r in heads.items() if r in places}), ranks)
    if board.missing:
        seen.silent = _silent({place.host for place in places.values()})
    told = board.ask("facts", [*heads.values()], deadline.left(_FACTS * seconds))
    node_of = {r: n for n, r in heads.items()}
    for r, answer in told.items():
        seen.facts[node_of[r]] = answer.value or {"errors": {"versions": answer.error}}
    if mine := seen.facts.get(board.place.node, {}).get("recipe"):
        seen.folder = _folder(board, mine["folder"], heads, deadline.left(_FOLDER * seconds))
    there = {n: r for n, r in heads.items() if r not in board.missing}
    measured = board.ask("clocks", [*there.values()], deadline.left(5.0), nodes=there)
    seen.clocks = {int(n): (a, b) for n, (a, b) in (measured[0].value or {}).items()}
    if board.missing:
        seen.unmeasured = "ranks are missing"
    else:
        device = (mine or {}).get("device", "auto")
        budget = deadline.left(_LINKS * seconds)
        found = board.ask("links", range(world), budget, nodes=ranks, device=device)
        seen.links = [link for r in sorted(found) for link in found[r].value or []]
        seen.links += [_broken(places[r], a.error) for r, a in found.items() if a.error]
    seen.missing = set(board.missing)
    return seen


def here(place: Place, board: Board, seconds: float) -> dict[str, Any]:
    """Where this rank stands."""
    del board, seconds
    return dataclasses.asdict(place)


def clocks(
    place: Place, board: Board, seconds: float, nodes: dict[str, int]
) -> dict[str, tuple[float, float]]:
    """On rank 0: seconds that each node's clock is ahead of its own, and by how much that may err.

    As NTP does it: half of the fastest round trip is the error.
    """
    found, deadline = {}, Deadline(seconds)
    for number, rank in nodes.items():
        if rank == 0 or place.rank not in (0, rank):
            continue
        trips = []
        for i in range(_PINGS):
            ping, pong = f"ping/{number}/{i}", f"pong/{number}/{i}"
            if place.rank:
                board.get(ping, deadline.left())
                board.put(pong, now())
                continue
            sent, began = now(), time.perf_counter()
            board.put(ping, True)
            try:
                theirs = board.get(pong, deadline.left(1.0))
            except TimeoutError:
                break
            trip = time.perf_counter() - began
            trips.append((trip / 2, theirs - sent - trip / 2))
        if trips:
            error, ahead = min(trips)
            found[number] = (ahead, error)
    return found


def now() -> float:
    """This node's clock, in seconds since the epoch."""
    return time.time()


def _folder(board: Board, path: str, heads: dict[int, int], seconds: float) -> dict[int, str]:
    """What is wrong with the run's folder, by node."""
    token = secrets.token_hex(8)
    node_of = {r: n for n, r in heads.items()}
    deadline = Deadline(seconds)
    wrong: dict[int, str] = {}
    rest = [r for r in heads.values() if r != 0]
    for ranks in ([0], rest):  # rank 0 makes the folder
        if not ranks or 0 in {heads[n] for n in wrong}:
            continue
        signed = board.ask("sign", ranks, deadline.left(0.4 * seconds), folder=path, token=token)
        wrong |= {node_of[r]: a.error for r, a in signed.items() if a.error}
    if not wrong and rest:
        nodes = [n for n, r in heads.items() if r not in board.missing]
        arguments = {"folder": path, "token": token, "nodes": nodes}
        looked = board.ask("look", [0, *rest], deadline.left(), **arguments)
        for r, answer in looked.items():
            unseen = answer.value or []
            for other in [node_of[r]] if r else unseen:
                if answer.error or unseen:
                    wrong[other] = answer.error or f"{path} is another folder than rank 0's there"
    board.ask("clean", [*heads.values()], max(0.5, deadline.left()), folder=path, token=token)
    return wrong


def _names(hosts: dict[int, str]) -> dict[int, str]:
    """Hosts, told apart by the number of the node where several have one name."""
    several = {h for h in hosts.values() if [*hosts.values()].count(h) > 1}
    return {n: f"{h} (node {n})" if h in several else h for n, h in hosts.items()}


def _silent(heard: set[str]) -> list[str]:
    """Of the nodes that Slurm gave to this job, those that we have not heard; else none."""
    if not (given := os.environ.get("SLURM_JOB_NODELIST")):
        return []
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", given], capture_output=True, text=True, timeout=3
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [host for host in told.stdout.split() if host not in heard]


def _broken(place: Place, error: str) -> dict[str, Any]:
    """A rank that could measure nothing at all."""
    return {"nodes": [place.node], "rail": place.local_rank, "round": 0, "error": error}


def result(seen: Seen, problems: list[Problem], seconds: float) -> dict[str, Any]:
    """As JSON values."""

    def told(fatal: bool) -> list[dict[str, Any]]:
        return [
            {
                "check": p.check,
                "nodes": [*p.nodes],
                "text": p.text,
                "mend": p.mend,
                "sentence": terminal.printable(p.sentence(len(seen.ranks))),
            }
            for p in problems
            if p.fatal == fatal
        ]

    return {
        "ok": not any(p.fatal for p in problems),
        "bad_input": any(p.check == "recipe" and len(p.nodes) == len(seen.ranks) for p in problems),
        "seconds": round(seconds, 2),
        "world": sum(map(len, seen.ranks.values())),
        "nodes": [
            {"name": seen.name(n), "ranks": ranks, **seen.facts.get(n, {})}
            for n, ranks in sorted(seen.ranks.items())
        ],
        "clocks": {seen.name(n): {"ahead_s": a, "error_s": e} for n, (a, e) in seen.clocks.items()},
        "links": [k | {"nodes": [seen.name(n) for n in k["nodes"]]} for k in seen.links],
        "failures": told(True),
        "warnings": told(False),
    }


def as_text(found: dict[str, Any]) -> str:
    """What rank 0 says: figures, then every problem in a line."""
    nodes = found["nodes"]
    lines = [f"nodes: {len(nodes)}, ranks: {found['world']}, looked at in {found['seconds']:.1f} s"]
    for kind, size in (("within a node", 1), ("between nodes", 2)):
        speeds = [k["gb_s"] for k in found["links"] if len(k["nodes"]) == size and not k["error"]]
        if speeds:
            lines.append(
                f"all-reduce {kind}: {min(speeds):.3g} to {max(speeds):.3g} GB/s, "
                f"links: {len(speeds)}"
            )
    off = [abs(clock["ahead_s"]) for clock in found["clocks"].values()]
    if off:
        lines.append(f"clocks: within {max(off):.3f} s of rank 0's")
    lines += [f"FAILED   {p['sentence']}" for p in found["failures"]]
    lines += [f"warning  {p['sentence']}" for p in found["warnings"]]
    return "\n".join([*lines, "ready" if found["ok"] else "not ready: mend what FAILED"])
