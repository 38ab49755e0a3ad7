"""Stages in a row: lineage, resume, refusal; killed and unbroken runs are bitwise the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from shardwise import checkpoint
from shardwise.errors import CheckpointError
from shardwise.metrics.writers import MetricsLogger
from shardwise.stages import loop
from shardwise.stages.results import write_result
from shardwise.storage.durable import StorageError
from tests.stages.recipes import metrics, overflowing, recipe, run, run_and_die, weights
from tests.support.daily import daily
from tests.support.pool import RankError, RankPool

ALL = ("pretrain", "sft", "grpo")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_run_ends_like_an_unbroken_one(ranks: RankPool, tmp_path: Path, world: int) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    ranks.run(run, recipe(clean, *ALL), world=world)
    for stage, step in (("pretrain", 1), ("pretrain", 3), ("sft", 0), ("grpo", 3)):
        ranks.run(run_and_die, recipe(broken, *ALL), stage, step, world=world)
    ranks.run(run, recipe(broken, *ALL), world=world)
    for stage in ALL:
        a, b = weights(clean, stage), weights(broken, stage)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a), stage
    assert metrics(clean) == metrics(broken)
    rollouts = [
        {p.name: p.read_bytes() for p in (d / "rollouts" / "grpo").glob("step_00000000*")}
        for d in (clean, broken)
    ]
    assert rollouts[0] and rollouts[0] == rollouts[1]


def test_finished_run_does_nothing_again(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", *ALL)
    [first] = ranks.run(run, config, world=1)
    files = [p for p in (tmp_path / "run" / "stages").rglob("*") if p.is_file()]
    before = {p: p.stat().st_mtime_ns for p in files}
    lines = metrics(tmp_path / "run")
    [second] = ranks.run(run, config, world=1)
    assert {p: p.stat().st_mtime_ns for p in files} == before
    assert metrics(tmp_path / "run") == lines
    assert second["stages"] == first["stages"]
    assert set(first["expected_seconds"]) == {"before", *ALL}
    assert all(s > 0 for s in first["expected_seconds"].values())
    assert set(second["expected_seconds"]) == {"before"}, "nothing is left to do"


def test_lineage_chains_config_data_and_parent(ranks: RankPool, tmp_path: Path) -> None:
    [summary] = ranks.run(run, recipe(tmp_path / "run", *ALL), world=1)
    stages = summary["stages"]
    assert [s["name"] for s in stages] == list(ALL)
    assert stages[0]["parent_hash"] == "seed-5"
    for parent, child in itertools.pairwise(stages):
        assert child["parent_hash"] == parent["checkpoint_hash"]
        assert child["parent"] == parent["checkpoint"]
    assert len({s["config_hash"] for s in stages}) == len({s["data_hash"] for s in stages}) == 3
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["stages"] == stages
    meta = checkpoint.read_meta(tmp_path / "run" / stages[1]["checkpoint"])
    assert meta["lineage"]["parent_hash"] == stages[1]["parent_hash"]


def test_each_stage_starts_from_its_parents_weights(ranks: RankPool, tmp_path: Path) -> None:
    """Stages that hardly move: their weights are the first stage's, not the initial ones."""
    still = [f"stages.{s}.optimizer.{k}" for s in ALL[1:] for k in ("lr=1e-30", "weight_decay=0.0")]
    ranks.run(run, recipe(tmp_path / "run", *ALL), *still, world=2)
    first, *others = (weights(tmp_path / "run", stage) for stage in ALL)
    for other in others:
        assert all(torch.equal(first[n], other[n]) for n in first if n.startswith("model."))


def test_another_recipe_is_refused_and_changes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(run, config, world=1)
    before = weights(tmp_path / "run", "pretrain")
    for override, word in (
        ("stages.pretrain.optimizer.lr=1e-3", "stages.pretrain.optimizer.lr: 0.01 there, 0.001"),
        ("seed=6", "seed: 5 there, 6 here"),
        ("model.hidden_size=64", "model.hidden_size: 32 there, 64 here"),
    ):
        with pytest.raises(RankError, match=word):
            ranks.run(run, config, override, world=1)
    (tmp_path / "corpus" / "0.txt").write_text("other text entirely")
    free = ("stages.pretrain.checkpoint.keep=1", "stages.pretrain.optimizer.fused=apex")
    ranks.run(run, config, *free, world=1)
    after = weights(tmp_path / "run", "pretrain")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_changed_data_is_noticed_in_mid_stage(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(run_and_die, config, "pretrain", 3, world=1)
    (tmp_path / "corpus" / "0.txt").write_text("other text entirely, but long enough")
    with pytest.raises(RankError, match="another data"):
        ranks.run(run, config, world=1)


@pytest.mark.parametrize("layout", daily(["dp2.zero1", "dp2.zero3", "dp2.zero0"], 1))
def test_resume_on_another_layout_sees_the_same_samples(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    """fp64, so that the layouts differ by rounding of 1e-16 alone."""
    clean, moved = tmp_path / "clean", tmp_path / "moved"
    ranks.run(run, recipe(clean, "pretrain"), "engine.precision=fp64", world=1)
    ranks.run(
        run_and_die, recipe(moved, "pretrain"), "pretrain", 3, "engine.precision=fp64", world=1
    )
    options = ("engine.precision=fp64", f"engine.layout={layout}")
    ranks.run(run, recipe(moved, "pretrain"), *options, world=2)
    a, b = weights(clean, "pretrain"), weights(moved, "pretrain")
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-9, atol=1e-9)
    seen = [[r.get("samples") for r in metrics(d)] for d in (clean, moved)]
    assert seen[0] == seen[1]


def fail_once(config: dict, step: int) -> None:  # type: ignore[type-arg]
    """The disk is full when ``step`` is saved."""
    original = checkpoint.save

    def save(root: Path, now: int, *args: object, **kwargs: object) -> Path:
        if now == step:
            raise CheckpointError("no space left on device")
        return original(root, now, *args, **kwargs)  # type: ignore[arg-type]

    with mock.patch.object(loop.checkpoint, "save", save):
        run(config)


def no_room_for_lines_once(config: dict) -> None:  # type: ignore[type-arg]
    """The disk is full when the metrics of the first checkpoint are synced, which rank 0 does."""
    original, failed = MetricsLogger.sync, []

    def sync(self: MetricsLogger) -> None:
        if self.enabled and not failed:
            failed.append(True)
            raise StorageError("metrics.jsonl: disk full; free some space")
        original(self)

    with mock.patch.object(MetricsLogger, "sync", sync):
        run(config)


def test_training_outlives_a_full_disk(ranks: RankPool, tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(fail_once, config, 2, world=2)
    assert checkpoint.list_steps(tmp_path / "run/stages/pretrain/checkpoints") == [4]
    notes = (tmp_path / "run" / "notes.jsonl").read_text()
    assert "checkpoint_failed" in notes and "no space left" in notes
    with pytest.raises(RankError, match="no space left"):
        ranks.run(fail_once, recipe(tmp_path / "other", "pretrain"), 4, world=1)
    config = recipe(tmp_path / "lines", "pretrain")
    ranks.run(no_room_for_lines_once, config, world=2)
    assert checkpoint.list_steps(tmp_path / "lines/stages/pretrain/checkpoints") == [4]
    assert "metrics.jsonl: disk full" in (tmp_path / "lines" / "notes.jsonl").read_text()


def run_and_overflow(config: dict, *overrides: str) -> None:  # type: ignore[type-arg]
    with overflowing(after=1):
        run(config, *overrides)


def test_diverging_run_stops_with_the_weights_of_the_last_good_step(
    ranks: RankPool, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    with pytest.raises(RankError, match="10 updates in a row"):
        ranks.run(run_and_overflow, config, "stages.0.steps=30", world=1)
    events = [r for r in metrics(tmp_path / "run") if r["kind"] == "event"]
    assert len(events) == 10 and all(e["event"] == "skipped" for e in events)


@pytest.mark.parametrize(
    "override,words",
    [
        ("stages.pretrain.batch.seq_len=4096", "model.max_seq_len"),
        ("engine.layout=dp3", "--nproc 3"),
        ("init_from=nowhere", "does not exist"),
        ("tokenizer.kind=file", "tokenizer"),
        ("model.vocab_size=7", "smaller than the tokenizer"),
    ],
)
def test_impossible_runs_are_refused_with_a_mend(
    ranks: RankPool, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(RankError, match=words):
        ranks.run(run, recipe(tmp_path / "run", "pretrain"), override, world=1)
    assert not (tmp_path / "run" / "stages").exists()


def test_bpe_needs_documents(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="pretrain stage"):
        ranks.run(run, recipe(tmp_path / "run", "sft"), "tokenizer.kind=bpe", world=1)


def test_a_hash_of_another_schema_is_no_other_recipe(ranks: RankPool, tmp_path: Path) -> None:
    """What an earlier version hashed otherwise is compared by the stored recipe's values."""
    config = recipe(tmp_path / "run", "pretrain")
    ranks.run(run, config, world=1)
    path = tmp_path / "run/stages/pretrain/result.json"
    result = json.loads(path.read_text())
    del result["xxh3_128"]  # made anew
    write_result(path, result | {"config_hash": "0" * 32})
    ranks.run(run, config, world=1)
    with pytest.raises(RankError, match=r"batch\.seq_len: 16 there"):
        ranks.run(run, config, "stages.pretrain.batch.seq_len=8", world=1)
    write_result(path, result | {"parent_hash": "0" * 32})
    with pytest.raises(
        RankError, match=r"another parent checkpoint \(now the weights of a seed; .*\. Continue"
    ):
        ranks.run(run, config, world=1)
