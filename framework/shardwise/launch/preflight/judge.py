"""From what was seen to problems, each with its nodes and its mend. Knows no process."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

CLOCK_S = 1.0  # by which a node's clock may be off
SLOW, BROKEN = 0.5, 0.25  # of what nodes usually have: a warning; a failure
COPIES = 4  # checkpoints there may be at once: two, the best, and the one that is being written
_MIB, _GIB = 1 << 20, 1 << 30
_LEAST_TEMPORARY, _LEAST_SHARED, _GOOD_SHARED = 256 * _MIB, 64 * _MIB, _GIB
_FATAL_VERSIONS = ("python", "shardwise", "torch", "cuda", "nccl")


@dataclasses.dataclass(frozen=True)
class Problem:
    """``nodes``: whose it is; ``fatal``: a failure, else a warning."""

    check: str
    text: str
    mend: str
    nodes: tuple[str, ...]
    fatal: bool = True

    def sentence(self, num_nodes: int) -> str:
        """In one line; what all nodes share is said once."""
        everyone = len(self.nodes) == num_nodes > 1
        who = "every node" if everyone else ", ".join(self.nodes)
        return f"{who}: {self.text}; {self.mend}"


@dataclasses.dataclass
class Seen:
    """What the ranks have told, by node number.

    Attributes:
        names: what nodes are called.
        ranks: the ranks of each.
        missing: ranks that did not answer.
        silent: names of nodes that the scheduler gave and none of which we heard, if known.
        facts: see `node.facts`.
        folder: what is wrong with the run's folder.
        clocks: seconds that a node is ahead of rank 0's, and how far that may be wrong.
        links: see `links.measure`.
        unmeasured: why there are no links, if so.
        min_gb_s: bandwidth below which a link is a failure.
    """

    names: dict[int, str]
    ranks: dict[int, list[int]]
    missing: set[int] = dataclasses.field(default_factory=set)
    silent: list[str] = dataclasses.field(default_factory=list)
    facts: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    folder: dict[int, str] = dataclasses.field(default_factory=dict)
    clocks: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    links: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unmeasured: str = ""
    min_gb_s: float = 0.0

    def name(self, node: int) -> str:
        """What people call a node."""
        return self.names.get(node, f"node {node}")


def judge(seen: Seen) -> list[Problem]:
    """All problems, failures first; the same problem of several nodes is one."""
    merged: dict[tuple[Any, ...], list[str]] = {}
    for node, check, text, mend, fatal in _found(seen):
        nodes = merged.setdefault((check, text, mend, fatal), [])
        if seen.name(node) not in nodes:
            nodes.append(seen.name(node))
    problems = [Problem(c, t, m, tuple(nodes), f) for (c, t, m, f), nodes in merged.items()]
    return sorted(problems, key=lambda p: not p.fatal)


_Found = tuple[int, str, str, str, bool]


def _found(seen: Seen) -> Iterator[_Found]:
    yield from _missing(seen)
    yield from _versions(seen)
    yield from _recipe(seen)
    for node, what in seen.folder.items():
        mend = "give run_dir on a file system that all nodes mount and may write"
        yield node, "folder", what, mend, True
    for node, (ahead, wrong) in seen.clocks.items():
        if abs(ahead) - wrong > CLOCK_S:
            text = f"its clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
            yield node, "clock", text, "start chrony or ntpd there", False
    for node, facts in seen.facts.items():
        yield from _space(node, facts)
        yield from _gpus(node, facts, len(seen.ranks[node]))
    yield from _links(seen)


def _missing(seen: Seen) -> Iterator[_Found]:
    gone: dict[int, list[int]] = {}
    for node, ranks in seen.ranks.items():
        if lost := sorted(seen.missing & set(ranks)):
            gone[node] = lost
    for node, lost in gone.items():
        whole = len(lost) == len(seen.ranks[node])
        text = f"{'no rank' if whole else 'not all ranks'} answered in time (of {_span(lost)})"
        if seen.silent and node not in seen.names:
            text += f"; allocated, and never heard: {', '.join(seen.silent)}"
        mend = "look at its log and whether it is up, or run without it"
        yield node, "missing", text, mend, True


def _span(ranks: list[int]) -> str:
    one = f"ranks {ranks[0]}-{ranks[-1]}"
    whole = ranks == list(range(ranks[0], ranks[-1] + 1)) and len(ranks) > 1
    return one if whole else f"rank {', '.join(map(str, ranks))}"


def _odd(values: Mapping[int, Hashable]) -> tuple[Any, dict[int, Any]]:
    """What most nodes have (of equals: the lowest node's), and the nodes that have another."""
    if not values:
        return None, {}
    common = Counter(values[node] for node in sorted(values)).most_common(1)[0][0]
    return common, {node: value for node, value in values.items() if value != common}


def _versions(seen: Seen) -> Iterator[_Found]:
    tables = {
        node: (facts.get("versions") or {}) | _driver(facts) for node, facts in seen.facts.items()
    }
    for name in dict.fromkeys(name for table in tables.values() for name in table):
        common, odd = _odd({node: table.get(name, "none") for node, table in tables.items()})
        for node, value in odd.items():
            fatal = name in _FATAL_VERSIONS
            text = f"{name} {value}, the others have {common}"
            yield node, "versions", text, "install one environment on all nodes", fatal
    hashes = {n: f["code"] for n, f in seen.facts.items() if f.get("code")}
    for node in _odd(hashes)[1]:
        mend = "use one commit, without local changes"
        yield node, "code", "its shardwise has other source code than the others'", mend, True
    for node, facts in seen.facts.items():
        for part in ("versions", "code"):
            if error := facts["errors"].get(part):
                yield node, part, error, "mend it, or run without this node", True


def _driver(facts: dict[str, Any]) -> dict[str, str]:
    found = facts.get("gpus")
    return {"driver": found["driver"]} if found else {}


def _recipe(seen: Seen) -> Iterator[_Found]:
    recipes = {n: f["recipe"] for n, f in seen.facts.items() if f.get("recipe")}
    for node, facts in seen.facts.items():
        if error := facts["errors"].get("recipe"):
            yield node, "recipe", error, "mend it there, or mount what the others have", True
    for node in _odd({n: r["hash"] for n, r in recipes.items()})[1]:
        text = "reads another recipe than the others"
        yield node, "recipe", text, "give all nodes one file and the same overrides", True
    for key in dict.fromkeys(key for r in recipes.values() for key in r["files"]):
        sets = {n: tuple(r["files"].get(key, {}).values()) for n, r in recipes.items()}
        common, odd = _odd(sets)
        for node, files in odd.items():
            text = f"{key}: {_files(files)}, the others have {_files(common)}"
            yield node, "files", text, "copy or mount the same files everywhere", True


def _files(manifest: tuple[Any, ...]) -> str:
    if not manifest:
        return "nothing"
    count, size, digest = manifest
    return f"{count} files of {size:,} bytes (hash {digest[:8]})"


def _space(node: int, facts: dict[str, Any]) -> Iterator[_Found]:
    space, gpus = facts.get("space") or {}, facts.get("gpus")
    if error := facts["errors"].get("space"):
        yield node, "space", error, "look at its disks", True
    temporary, shared = space.get("temporary files"), space.get("shared memory")
    if temporary and temporary["free"] < _LEAST_TEMPORARY:
        text = f"{temporary['place']}: {_size(temporary['free'])} free for temporary files"
        yield node, "space", text, "free some, or set TMPDIR", temporary["free"] < _MIB
    if shared and shared["free"] < (_GOOD_SHARED if gpus else _LEAST_SHARED):
        text = f"{shared['place']}: {_size(shared['free'])} of shared memory free"
        fatal = bool(gpus) and shared["free"] <= _LEAST_SHARED
        mend = "NCCL needs it: start the container with --shm-size=1g or more"
        yield node, "space", text, mend if gpus else "free some", fatal
    if recipe := facts.get("recipe"):
        place, free, one = recipe["space"]["place"], recipe["space"]["free"], _checkpoint(recipe)
        if free < COPIES * one:
            text = f"{place}: {_size(free)} free, and a checkpoint takes {_size(one)}"
            mend = f"free {_size(COPIES * one)}, or give another run_dir"
            yield node, "space", text, mend, free < one


def _checkpoint(recipe: dict[str, Any]) -> int:
    return max(int(recipe["checkpoint_bytes"]), _MIB)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:.0f} MiB"


def _gpus(node: int, facts: dict[str, Any], ranks: int) -> Iterator[_Found]:
    drain = "drain the node, or run without it"
    if error := facts["errors"].get("gpus"):
        yield node, "gpus", error, drain, True
    if not (found := facts.get("gpus")):
        return
    if len(found["gpus"]) < ranks:
        text = f"{len(found['gpus'])} GPUs for {ranks} ranks"
        yield node, "gpus", text, "start one rank for each GPU, or look for the lost one", True
    kinds = {(g["name"], g["ecc"]) for g in found["gpus"]}
    if len(kinds) > 1:
        text = f"GPUs of several kinds: {', '.join(f'{n} (ECC {e})' for n, e in sorted(kinds))}"
        yield node, "gpus", text, "the slowest sets the pace; use nodes of one kind", False
    for key, fatal in (("failures", True), ("warnings", False)):
        for text in found[key]:
            yield node, "gpus", text, drain, fatal


def _links(seen: Seen) -> Iterator[_Found]:
    if seen.unmeasured:
        text = f"bandwidth was not measured: {seen.unmeasured}"
        for node in seen.ranks:
            yield node, "links", text, "try again when all ranks are there", False
    failed = [link for link in seen.links if link["error"]]
    first = min((link["round"] for link in failed), default=0)
    for link in failed:  # of later rounds: those who waited for one of these
        if link["round"] == first:
            text = f"{_link(seen, link)} does not work: {link['error']}"
            mend = "look at its network, its firewall and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
            for node in link["nodes"]:
                yield node, "links", text, mend, True
    for between in (False, True):
        good = [k for k in seen.links if not k["error"] and (len(k["nodes"]) > 1) == between]
        yield from _slow(seen, good)


def _slow(seen: Seen, links: list[dict[str, Any]]) -> Iterator[_Found]:
    """Links far below what is usual: a node of which all are is named, else both ends."""
    best: dict[int, float] = {}
    for link in links:
        for node in link["nodes"]:
            best[node] = max(best.get(node, 0.0), link["gb_s"])
    usual = statistics.median(best.values()) if len(best) > 2 else 0.0
    slow = {node for node, gb_s in best.items() if gb_s < SLOW * usual}
    for node in sorted(slow):
        which = "between it and all others" if len(links[0]["nodes"]) > 1 else "within it"
        text = f"slow: {best[node]:.3g} GB/s at best {which}, usual are {usual:.3g}"
        yield (
            node,
            "links",
            text,
            "look at its network, or run without it",
            (best[node] < BROKEN * usual),
        )
    for link in links:
        floor = link["gb_s"] < seen.min_gb_s
        if floor or (link["gb_s"] < SLOW * usual and not slow & set(link["nodes"])):
            wanted = f"asked for {seen.min_gb_s:.3g}" if floor else f"usual are {usual:.3g}"
            text = f"{_link(seen, link)} is slow: {link['gb_s']:.3g} GB/s, {wanted}"
            fatal = floor or link["gb_s"] < BROKEN * usual
            for node in link["nodes"]:
                yield node, "links", text, "look at the network between them", fatal


def _link(seen: Seen, link: dict[str, Any]) -> str:
    names = [seen.name(node) for node in link["nodes"]]
    if len(names) == 1:
        return f"the link within {names[0]}"
    return f"the link {' - '.join(names)}" + (f" of rank {link['rail']}" if link["rail"] else "")
