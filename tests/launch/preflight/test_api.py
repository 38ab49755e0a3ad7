"""Whole looks at ranks that stand for nodes, with faults planted on some of them."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from shardwise.launch.preflight import api, folder, links, node
from shardwise.launch.preflight.api import as_text, join
from shardwise.launch.preflight.board import Place
from shardwise.resilience import attempts
from tests.cli.conftest import Command, shardwise, write_recipe  # noqa: F401  # a fixture
from tests.support.pool import RankPool


def hang() -> str:
    time.sleep(60)
    return ""


@contextlib.contextmanager
def planted(fault: str, there: Path) -> Iterator[None]:
    """A fault of this rank's node; ``there``: a folder that only this node has."""
    versions = node.versions()
    other = {
        "version": patch.object(node, "versions", lambda: versions | {"torch": "2.0.1"}),
        "code": patch.object(node, "code_hash", lambda: "0ther"),
        "hang": patch.object(node, "code_hash", hang),
        "files": contextlib.chdir(there),
        "clock": patch.object(api, "now", lambda: time.time() + 7),
        "disk": patch.object(node, "free", lambda place: {"place": str(place), "free": 1}),
        "unshared": patch.object(
            folder, "_mark", lambda _, token, number: there / f"{token}-{number}"
        ),
    }
    with other.get(fault, contextlib.nullcontext()):
        yield


def look(
    recipe: str, faults: dict[int, str], there: Path, key: str, world: int, **given: Any
) -> dict[str, Any]:
    """This rank's part; of a world of which some may not be there."""
    rank = dist.get_rank()
    place = Place(rank, world, rank, 0, 1, f"n{rank}")
    store = PrefixStore(key, _get_default_store())
    overrides = ["seed=7"] if faults.get(rank) == "recipe" else []
    measure = links.bandwidth

    def bandwidth(store: Any, number: int, ranks: list[int], *rest: Any) -> float:
        slow = any(faults.get(r) == "slow" for r in ranks)
        return min(measure(store, number, ranks, *rest), 1e-9) * (1 if slow else 10)

    here = contextlib.chdir(Path(recipe).parent), patch.object(links, "bandwidth", bandwidth)
    with here[0], here[1], planted(faults.get(rank, ""), there):
        return join(store, place, recipe, overrides, **given)


def write(folder: Path) -> str:
    """A recipe whose data are looked for in the current folder."""
    path = write_recipe(folder)
    path.write_text(path.read_text().replace(f"{folder}/train.txt", "train.txt"))
    return str(path)


def found_by(
    ranks: RankPool, tmp_path: Path, faults: dict[int, str], present: int = 4, **given: Any
) -> dict[str, Any]:
    """What rank 0 of four tells, of whom so many are there."""
    there = tmp_path / "there"
    there.mkdir()
    arguments = write(tmp_path), faults, there, uuid.uuid4().hex, 4
    here = ranks.run(look, *arguments, world=present, **given)
    assert all(other == {"ok": here[0]["ok"]} for other in here[1:])
    left = [p.name for p in (*there.iterdir(), *(tmp_path / "run").glob("*"))]
    assert left == []  # no marks
    return here[0]  # type: ignore[no-any-return]


def told(found: dict[str, Any], kind: str) -> set[tuple[str, tuple[str, ...]]]:
    return {(p["check"], tuple(p["nodes"])) for p in found[kind]}


def test_sound_nodes_are_ready(ranks: RankPool, tmp_path: Path) -> None:
    found = found_by(ranks, tmp_path, {})
    assert found["ok"] and not found["failures"], as_text(found)
    assert [n["name"] for n in found["nodes"]] == ["n0", "n1", "n2", "n3"]
    assert set(found["clocks"]) == {"n1", "n2", "n3"} and len(found["links"]) == 6
    files = found["nodes"][2]["recipe"]["files"]
    assert set(files) == {"stages.0.data.sources.0", "stages.0.data.validation.0"}
    assert as_text(found).endswith("\nready") and json.dumps(found)


@pytest.mark.parametrize(
    ("faults", "failures", "warnings"),
    [
        (
            {1: "version", 2: "files", 3: "clock"},
            {("versions", ("n1",)), ("recipe", ("n2",))},
            {("clock", ("n3",))},
        ),
        (
            {1: "code", 2: "recipe", 3: "slow"},
            {("code", ("n1",)), ("recipe", ("n2",)), ("links", ("n3",))},
            set(),
        ),
        ({1: "unshared", 2: "disk"}, {("folder", ("n1",)), ("space", ("n2",))}, set()),
    ],
)
def test_every_fault_is_named_by_node(
    ranks: RankPool, tmp_path: Path, faults: dict[int, str], failures: set[Any], warnings: set[Any]
) -> None:
    found = found_by(ranks, tmp_path, faults, seconds=15.0)
    assert not found["ok"] and told(found, "failures") == failures, as_text(found)
    assert warnings <= told(found, "warnings"), as_text(found)
    assert "not ready" in as_text(found)


def test_files_of_other_content_are_found(ranks: RankPool, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "train.txt").write_text("train: the quick brown fox leaps. " * 40)
    arguments = write(tmp_path), {1: "files"}, there, uuid.uuid4().hex, 3
    found = ranks.run(look, *arguments, world=3)[0]
    assert told(found, "failures") == {("files", ("n1",))}, as_text(found)
    assert "stages.0.data.sources.0: 1 files" in found["failures"][0]["text"]


def test_a_node_that_is_not_there_and_one_that_hangs(ranks: RankPool, tmp_path: Path) -> None:
    found = found_by(ranks, tmp_path, {1: "hang"}, present=3, seconds=8.0)
    names = told(found, "failures")
    assert names == {("missing", ("node 3",)), ("code", ("n1",))}, as_text(found)
    assert "did not end within" in as_text(found) and not found["links"]


def test_nodes_that_slurm_gave_and_nobody_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "scontrol"
    tool.write_text("#!/bin/sh\n[ \"$*\" = 'show hostnames gpu[1-3]' ] && echo gpu1 gpu2 gpu3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    assert api._silent({"gpu1", "gpu3"}) == []
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-3]")
    assert api._silent({"gpu1", "gpu3"}) == ["gpu2"]


def test_the_command(
    shardwise: Command,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv(attempts.RUN, str(tmp_path / "run"))
    monkeypatch.setenv(attempts.ATTEMPT, "slurm.7.0")
    code, out, err = shardwise("doctor", "--cluster", recipe, "--json", tmp_path / "found.json")
    assert code == 0 and out.endswith("ready\n"), err
    assert json.loads((tmp_path / "found.json").read_text())["ok"]
    code, out, _ = shardwise("doctor", "--cluster", recipe, "stages.0.batch.seq_len=99")
    assert code == 1 and "FAILED" in out and "99 exceeds" in out
    (attempt,) = attempts.read(tmp_path / "run")  # what a batch script decides by
    assert attempt.exit_code == 2 and "99 exceeds" in attempt.reason
    code, _, err = shardwise("doctor", recipe)
    assert code == 2 and "--cluster" in err


def test_ranks_of_this_machine(shardwise: Command, tmp_path: Path) -> None:  # noqa: F811
    recipe = write_recipe(tmp_path)
    (tmp_path / "train.txt").unlink()
    code, out, _ = shardwise("doctor", "--cluster", recipe, "--nproc", 2, "--json", "-")
    found = json.loads(out)
    assert (code, found["world"], len(found["nodes"])) == (1, 2, 1)
    assert [p["check"] for p in found["failures"]] == ["recipe"]
    assert "train.txt" in found["failures"][0]["text"]
    assert len(found["links"]) == 1 and found["links"][0]["gb_s"] > 0
