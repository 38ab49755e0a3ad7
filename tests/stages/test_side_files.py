"""Files beside the checkpoints: damaged in any way, they neither stop a run nor change it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from shardwise.launch.train import train
from shardwise.storage.lock import LockedError, RunLock
from tests.stages.recipes import recipe, run, run_and_die
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


@pytest.mark.parametrize("damage", ["empty", "flip", "missing", "mark", "folder", "garbage mark"])
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
