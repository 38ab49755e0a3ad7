"""Self-checks of the post-training benchmark: equal work, disagreement seen, a race to the end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import common
import post_training as bench
import torch
from peers.trl_tuning import Setting, TrlTuning

from tests.support.pool import RankPool


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", bench.SIZES)
def test_rows_fit_and_hold_no_special_token(kind: str, name: str) -> None:
    size = bench.SIZES[name]
    rows = bench.rows_of(kind, size)
    assert len(rows) == (size.examples if kind == "sft" else size.pairs)
    for prompt, answer, worse in rows:
        assert prompt and answer and bool(worse) == (kind == "dpo")
        assert len(prompt) + max(len(answer), len(worse)) <= size.length
        assert max(prompt + answer + worse) < size.words
    assert rows == bench.rows_of(kind, size)  # both sides' processes make the same


def test_differences_are_relative_and_the_largest() -> None:
    found = bench.differences([(2.0, 1.0), (4.0, 3.0)], [(2.0, 1.0), (5.0, 2.0)])
    assert found == {"losses": pytest.approx(0.2), "gradient norms": pytest.approx(0.5)}
    bench.accept({"losses": 1e-6}, "fp32")
    for bad in (1e-3, float("nan")):
        with pytest.raises(SystemExit, match="disagree"):
            bench.accept({"losses": 1e-6, "gradient norms": bad}, "fp32")


def test_memory_sees_what_is_held_and_forgets() -> None:
    memory = common.Memory()
    big = torch.ones(32 << 20)
    assert memory.peak() >= 128 << 20
    del big
    memory.reset()
    assert memory.peak() < 128 << 20


def replays(folder: str) -> dict[str, Any]:
    """Of each method both sides' steps; and TRL's from another adapter."""
    place, found = Path(folder), {}
    start = bench.folder_of("tiny", None, place)
    for title, method in bench.METHODS.items():
        task = bench.task_of("tiny", method, start, bench.CHECKED_LR)
        stage = bench.our_stage(task, "fp32", compile=False)
        task = dataclasses.replace(task, start=bench.start_of(task, stage))
        steps = [stage.train_step(i, task.lr) for i in range(bench.CHECKED_STEPS)]
        ours = [(m["loss"], m["grad_norm"]) for m in steps]
        for setting in [Setting()] + [Setting(packed=True)] * (title == "sft"):
            theirs = TrlTuning(task, "fp32", setting).replay(bench.CHECKED_STEPS)
            found[f"{title} {setting.packed}"] = bench.differences(ours, theirs)
        if title == "lora":
            moved = {n: 1.01 * t for n, t in task.start.items()}
            other = TrlTuning(dataclasses.replace(task, start=moved), "fp32")
            found["moved"] = bench.differences(ours, other.replay(bench.CHECKED_STEPS))
    return found


def test_both_sides_take_the_same_steps(ranks: RankPool, tmp_path: Path) -> None:
    [found] = ranks.run(replays, str(tmp_path), world=1)
    assert max(found.pop("moved").values()) > bench.TOLERANCE["fp32"]
    assert len(found) == len(bench.METHODS) + 1
    for title, differences in found.items():
        assert max(differences.values()) < bench.TOLERANCE["fp32"], title


def test_runs_to_the_end() -> None:
    short = ["--turns", "2", "--warmup", "1", "--threads", "1", "--no-compile", "--peers", "TRL"]
    result = bench.main(["--models", "tiny", "--methods", "sft", *short])["tiny sft"]
    assert set(result["seconds"]) == set(result["memory"]) == {bench.OURS, "TRL"}
    assert result["ratio"] > 0 and result["fraction_of_gemm"] > 0 and result["peer"] == "TRL"
    assert min(result["memory"].values()) > 0
