"""From what was seen to whom it is told of."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest

from shardwise.launch.preflight.judge import Seen, judge

GIB = 1 << 30
FACTS: dict[str, Any] = {
    "versions": {"python": "3.12.1", "torch": "2.9.0", "numpy": "2.1"},
    "code": "c0de",
    "gpus": {
        "driver": "570.1",
        "gpus": [{"name": "H100", "uuid": "u", "ecc": "Enabled"}] * 2,
        "failures": [],
        "warnings": [],
    },
    "space": {
        "temporary files": {"place": "/tmp", "free": 50 * GIB},
        "shared memory": {"place": "/dev/shm", "free": 50 * GIB},
    },
    "recipe": {
        "hash": "aa",
        "folder": "/shared/run",
        "space": {"place": "/shared", "free": 900 * GIB},
        "files": {"stages.0.data.sources.0": {"count": 2, "bytes": 99, "hash": "f0"}},
        "checkpoint_bytes": 10 * GIB,
    },
    "errors": {},
}


def link(*nodes: int, gb_s: float = 20.0, **more: Any) -> dict[str, Any]:
    return {"nodes": [*nodes], "rail": 0, "round": 1, "error": "", "gb_s": gb_s} | more


def sound(count: int = 4) -> Seen:
    """Nodes n0, n1, ... of two ranks, all alike."""
    seen = Seen({n: f"n{n}" for n in range(count)}, {n: [2 * n, 2 * n + 1] for n in range(count)})
    seen.facts = {n: copy.deepcopy(FACTS) for n in range(count)}
    seen.clocks = dict.fromkeys(range(1, count), (0.01, 0.001))
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    seen.links = [link(n, gb_s=100.0, round=0) for n in range(count)] + [link(*p) for p in pairs]
    return seen


def test_sound_nodes_have_no_problem() -> None:
    assert judge(sound()) == []
    assert judge(sound(1)) == []


Plant = Callable[[Seen], Any]


def at(path: str, value: Any) -> Plant:
    """Plant a value in the facts of node 2."""

    def plant(seen: Seen) -> None:
        *way, last = path.split("/")
        place = seen.facts[2]
        for key in way:
            place = place[key]
        place[last] = value

    return plant


FAILURES: list[tuple[str, Plant, str]] = [
    ("versions", at("versions/torch", "2.8.0"), "torch 2.8.0, the others have 2.9.0"),
    ("versions", at("versions", {"python": "3.12.1", "numpy": "2.1"}), "torch none"),
    ("code", at("code", "0ther"), "other source code"),
    ("recipe", at("recipe/hash", "bb"), "another recipe"),
    ("recipe", at("errors/recipe", "r.yaml: no such file"), "r.yaml: no such file"),
    (
        "files",
        at("recipe/files/stages.0.data.sources.0/bytes", 98),
        r"stages.0.data.sources.0: 2 files of 98 bytes \(hash f0\), the others have 2 files of 99",
    ),
    ("files", at("recipe/files", {}), "nothing, the others have 2 files"),
    ("folder", lambda s: s.folder.update({2: "/shared/run is another folder"}), "another folder"),
    ("space", at("recipe/space/free", 9 * GIB), "9.0 GiB free, and a checkpoint takes 10.0 GiB"),
    ("space", at("space/shared memory/free", 64 << 20), "64 MiB of shared memory free"),
    ("space", at("errors/space", "did not end"), "did not end"),
    ("gpus", at("errors/gpus", "nvidia-smi: exited with 9"), "exited with 9"),
    ("gpus", at("gpus/failures", ["GPU 1 has 3 uncorrectable ECC errors"]), "GPU 1 has 3"),
    ("gpus", at("gpus/gpus", FACTS["gpus"]["gpus"][:1]), "1 GPUs for 2 ranks"),
    ("missing", lambda s: s.missing.update({4, 5}), r"no rank answered in time \(of ranks 4-5\)"),
    ("missing", lambda s: s.missing.add(5), r"not all ranks answered in time \(of rank 5\)"),
]

WARNINGS: list[tuple[str, Plant, str]] = [
    ("versions", at("versions/numpy", "2.0"), "numpy 2.0, the others have 2.1"),
    ("versions", at("gpus/driver", "550.9"), "driver 550.9, the others have 570.1"),
    ("clock", lambda s: s.clocks.update({2: (-7.0, 0.1)}), "7.0 s behind"),
    ("space", at("recipe/space/free", 30 * GIB), "a checkpoint takes 10.0 GiB"),
    ("space", at("space/shared memory/free", 128 << 20), "128 MiB of shared memory free"),
    ("space", at("space/temporary files/free", 100 << 20), "100 MiB free for temporary"),
    ("gpus", at("gpus/warnings", ["GPU 0 is slowed"]), "GPU 0 is slowed"),
    ("gpus", at("gpus/gpus", [{"name": n, "ecc": "on"} for n in "AB"]), "several kinds: A"),
]


@pytest.mark.parametrize(
    ("fatal", "check", "plant", "says"),
    [(True, *row) for row in FAILURES] + [(False, *row) for row in WARNINGS],
)
def test_one_node_with_one_fault(fatal: bool, check: str, plant: Plant, says: str) -> None:
    seen = sound()
    plant(seen)
    (problem,) = judge(seen)
    assert (problem.fatal, problem.check, problem.nodes) == (fatal, check, ("n2",))
    assert re.match(f"n2: .*{says}.*; .+", problem.sentence(4))


def test_a_clock_that_may_be_right_is_not_told() -> None:
    seen = sound()
    seen.clocks[2] = (1.5, 0.9)
    assert judge(seen) == []


def test_what_all_share_is_said_once() -> None:
    seen = sound()
    for facts in seen.facts.values():
        facts["recipe"], facts["errors"]["recipe"] = None, "seq_len: 99 exceeds 64"
    (problem,) = judge(seen)
    assert problem.sentence(4).startswith("every node: seq_len")


def test_allocated_nodes_that_were_never_heard_are_named() -> None:
    seen = sound()
    del seen.names[3], seen.facts[3]
    seen.missing, seen.silent = {6, 7}, ["gpu017"]
    (problem,) = judge(seen)
    assert problem.sentence(4).startswith("node 3: no rank answered")
    assert "gpu017" in problem.text


@pytest.mark.parametrize(
    ("count", "gb_s", "fatal"), [(3, 8.0, False), (3, 2.0, True), (4, 8.0, False), (9, 2.0, True)]
)
def test_a_slow_node_is_named_and_nobody_else(count: int, gb_s: float, fatal: bool) -> None:
    seen = sound(count)
    seen.links = [
        k | {"gb_s": gb_s} if 2 in k["nodes"] and len(k["nodes"]) == 2 else k for k in seen.links
    ]
    (problem,) = judge(seen)
    assert (problem.nodes, problem.fatal) == (("n2",), fatal)
    assert f"slow: {gb_s:g} GB/s at best between it and all others, usual are 20" in problem.text


def test_one_slow_cable_names_both_ends() -> None:
    seen = sound()
    seen.links = [k | {"gb_s": 8.0} if k["nodes"] == [1, 3] else k for k in seen.links]
    (problem,) = judge(seen)
    assert (problem.nodes, problem.fatal) == (("n1", "n3"), False)
    assert "the link n1 - n3 is slow: 8 GB/s" in problem.text


def test_a_slow_node_inside() -> None:
    seen = sound()
    seen.links = [k | {"gb_s": 9.0} if k["nodes"] == [2] else k for k in seen.links]
    (problem,) = judge(seen)
    assert problem.nodes == ("n2",) and "within it" in problem.text and problem.fatal


def test_two_nodes_are_judged_by_what_was_asked_for() -> None:
    seen = sound(2)
    seen.links = [link(0, 1, gb_s=3.0)]
    assert judge(seen) == []
    seen.min_gb_s = 5.0
    (problem,) = judge(seen)
    assert problem.nodes == ("n0", "n1") and problem.fatal and "asked for 5" in problem.text


def test_those_who_wait_for_a_broken_link_are_not_blamed() -> None:
    seen = sound()
    seen.links = [
        link(0, 1, error="Timed out", gb_s=None, round=2),
        link(2, 3, round=2),
        link(0, 2, error="Timed out", gb_s=None, round=3),
        link(1, 3, error="Timed out", gb_s=None, round=3),
    ]
    (problem,) = judge(seen)
    assert problem.nodes == ("n0", "n1") and "does not work: Timed out" in problem.text
