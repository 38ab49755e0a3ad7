"""Files beside the checkpoints: damaged in any way, they neither stop a run nor change it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import checkpoint
from shardwise.errors import ShardwiseError
from shardwise.launch.train import train
from shardwise.storage.lock import LockedError, RunLock
from tests.stages.recipes import recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankError, RankPool


def test_a_second_run_is_refused_before_it_writes(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = recipe(folder, "pretrain")
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "rank_1.log").write_text("of the run that lives here")
    with RunLock(folder):
        before = sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))
        with pytest.raises(
            LockedError, match=f"another run lives in this folder: pid {os.getpid()}"
        ):
            train(config, nproc=2)
        with pytest.raises(RankError, match=r"LockedError: .*another run lives"):
            ranks.run(run, config, world=2)  # as torchrun starts them: all are told
        assert sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*")) == before
    ranks.run(run, config, world=2)
    assert not (folder / ".lock" / "holder.json").exists()


DAMAGE = daily(["empty", "flip", "missing", "mark", "folder", "garbage mark"], 1, 3)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_tokenizer_comes_back_from_a_checkpoint(
    ranks: RankPool, tmp_path: Path, damage: str
) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    bpe = ["tokenizer.kind=bpe", "tokenizer.vocab_size=270"]
    ranks.run(run_and_die, config, "pretrain", 3, *bpe, world=1)
    folder = tmp_path / "run" / "tokenizer"
    sound = {p.name: p.read_bytes() for p in folder.iterdir()}
    file = folder / "tokenizer.json"
    if damage == "empty":
        file.write_bytes(b"")
    elif damage == "flip":
        file.write_bytes(sound[file.name][:-9] + b"x" + sound[file.name][-8:])
    elif damage == "missing":
        file.unlink()
    elif damage == "mark":
        (folder / "ready").unlink()
    elif damage == "garbage mark":
        (folder / "ready").write_bytes(b"\xff\x00garbage")
    else:
        shutil.rmtree(folder)
        folder.write_text("no folder")
    ranks.run(run, config, *bpe, world=1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == sound
    assert (tmp_path / "run" / "tokenizer.damaged-1").exists()


def _folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"x")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size or 1)),
    "flipped": _flip,
    "garbage": lambda path, rng: path.write_bytes(rng.randbytes(300)),
    "nulls": lambda path, _: path.write_bytes(b"\0" * path.stat().st_size),
    "folder": _folder,
    "missing": lambda path, _: path.unlink(),
}


def interrupted(folder: Path, config: dict[str, Any], options: Sequence[str]) -> list[str]:
    """A run killed in its second stage; its files, but for what belongs to a checkpoint."""
    run_and_die(config, "sft", 3, *options)
    shutil.copytree(folder, folder.with_name("kept"))
    files = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    return [str(p) for p in files if not any("step_" in part for part in p.parts)]


def resumed(
    folder: Path, config: dict[str, Any], options: Sequence[str], cases: Sequence[tuple[str, str]]
) -> list[str]:
    """What becomes of the run after each damage to one of its files."""
    clean = {s: weights(folder.with_name("clean"), s) for s in ("pretrain", "sft")}
    told = []
    for number, (name, damage) in enumerate(cases):
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("kept"), folder)
        DAMAGES[damage](folder / name, random.Random(number))
        try:
            run(config, *options)
        except ShardwiseError as error:
            told.append("" if Path(name).name in str(error) else f"{name} {damage}: {error}")
            continue
        found = {s: weights(folder, s) for s in clean}
        same = all(torch.equal(t, found[s][n]) for s in clean for n, t in clean[s].items())
        told.append("" if same else f"{name} {damage}: other weights")
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert all(isinstance(json.loads(line), dict) for line in lines)
    return told


def prepared(
    ranks: RankPool, tmp_path: Path
) -> tuple[Path, dict[str, Any], tuple[str, ...], list[str]]:
    folder, options = tmp_path / "run", ("tokenizer.kind=bpe", "tokenizer.vocab_size=270")
    config = recipe(folder, "pretrain", "sft")
    ranks.run(run, config | {"run_dir": str(tmp_path / "clean")}, *options, world=1)
    [files] = ranks.run(interrupted, folder, config, options, world=1)
    expected = {"metrics.jsonl", "notes.jsonl", "config.yaml", "tokenizer/ready"}
    assert expected | {"stages/pretrain/result.json"} <= set(files)
    return folder, config, options, files


def test_a_damaged_side_file_never_changes_a_run(ranks: RankPool, tmp_path: Path) -> None:
    """Each file once, each damage in turn: bitwise the same end, or a refusal that names it."""
    folder, config, options, files = prepared(ranks, tmp_path)
    kinds = list(DAMAGES)
    names = [name for name in files if not name.startswith(("cache", "provenance", ".lock/r"))]
    cases = [(name, kinds[i % len(kinds)]) for i, name in enumerate(names)]
    [told] = ranks.run(resumed, folder, config, options, cases, world=1, timeout=900)
    assert not any(told), told


@pytest.mark.slow
def test_no_damage_to_any_side_file_changes_a_run(ranks: RankPool, tmp_path: Path) -> None:
    folder, config, options, files = prepared(ranks, tmp_path)
    cases = [(name, damage) for name in files for damage in DAMAGES]
    [told] = ranks.run(resumed, folder, config, options, cases, world=1, timeout=900)
    assert not any(told), told


def lost(folder: Path, config: dict[str, Any], what: str) -> list[str]:
    """A finished run of which a checkpoint is gone; what it then says and notes."""
    root = folder / "stages" / "pretrain" / "checkpoints"
    for step in checkpoint.list_steps(root)[-1 if what == "last" else 0 :]:
        shutil.rmtree(root / f"step_{step:08d}")
    try:
        run(config)
    except ShardwiseError as error:
        return [str(error)]
    notes = (json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines())
    return [n["message"] for n in notes if n["event"] == "checkpoint_lost"]


def test_a_finished_stage_without_its_checkpoint_is_not_trained_again_unsaid(
    ranks: RankPool, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(run, config, world=1)
    before = weights(tmp_path / "run", "pretrain")
    [[note]] = ranks.run(lost, tmp_path / "run", config, "last", world=1)
    assert "finished, but its last checkpoint is not what it was" in note
    after = weights(tmp_path / "run", "pretrain")
    assert all(torch.equal(before[n], after[n]) for n in before)
    [[error]] = ranks.run(lost, tmp_path / "run", config, "all", world=1)
    assert "result.json: says that stage pretrain is finished, but" in error
