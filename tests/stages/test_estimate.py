"""What a run is said to take: FLOPs by hand, and seconds from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.config.registry import EVALUATION_CONFIGS, STAGE_CONFIGS
from shardwise.config.schema import StageConfig, TokenizerConfig
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.stages import estimate as room
from shardwise.stages.estimate import Case, Work, estimate, expectation, lengths, work_of
from shardwise.stages.loop import flops_per_token
from tests.stages.recipes import recipe

RATE = 1e9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TokenizerConfig(kind="bytes"))


def case_of(tmp_path: Path, *kinds: str, done: int = 0, **changes: Any) -> tuple[Any, Any]:
    config = recipe(tmp_path / "run", *kinds)
    config["stages"][-1] |= changes
    config["model"]["vocab_size"] = 300
    run = load_config(config).config
    return run, run.stages[-1]


def test_every_kind_of_ours_has_a_rule() -> None:
    unknown = work_of.dispatch(object)
    training = [c for c in STAGE_CONFIGS.values() if issubclass(c, StageConfig)]
    ours = (*training, *EVALUATION_CONFIGS.values())
    assert [c for c in ours if c.__module__.startswith("shardwise.") and
            work_of.dispatch(c) is unknown] == []  # fmt: skip


def test_rows_of_the_steps_that_are_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run, stage = case_of(
        tmp_path, "pretrain", steps=10, batch={"global_batch": 6, "micro_batch": 2, "seq_len": 16}
    )
    a_step = 6 * 16 * flops_per_token(run.model, 16)
    num_bytes = sum(f.stat().st_size for f in (tmp_path / "corpus").iterdir())
    whole = work_of(stage, Case(run, stage, tokenizer))
    assert whole == Work(rows=10 * a_step, seconds=num_bytes / room.TEXT_BYTES_A_SECOND)
    (tmp_path / "run" / "cache").mkdir(parents=True)  # tokenised before
    assert work_of(stage, Case(run, stage, tokenizer, done=4)) == Work(rows=6 * a_step)


def test_a_teacher_reads_what_the_student_learns(tmp_path: Path, tokenizer: Tokenizer) -> None:
    task = {"kind": "count_letters"}
    given = [
        work_of(stage, Case(run, stage, tokenizer))
        for share in (0.0, 0.5, 1.0)
        for run, stage in [
            case_of(tmp_path, "pretrain", "distill", on_policy_fraction=share, task=task)
        ]
    ]
    texts, half, own = given
    assert texts and half and own and texts.decode == 0 < own.decode
    assert half.rows == pytest.approx((texts.rows + own.rows) / 2)
    outside = {"teacher": {"init_from": "/models/teacher"}}
    run, stage = case_of(tmp_path, "pretrain", "distill", task=task, roles=outside)
    assert work_of(stage, Case(run, stage, tokenizer)) is None


@pytest.mark.parametrize("kl", ["none", "k3"])
def test_a_rollout_decodes_trains_and_reads(tmp_path: Path, tokenizer: Tokenizer, kl: str) -> None:
    loss = {"kl": kl, "kl_coef": 0.0 if kl == "none" else 0.1}
    run, stage = case_of(tmp_path, "grpo", loss=loss, epochs_per_rollout=2)
    prompt, answer = lengths(stage.task, tokenizer)
    assert answer == 2, "a digit and the end"
    row = prompt + 4 * answer
    flops = row * flops_per_token(run.model, int(row))
    # Two epochs; log-probabilities before them, and the reference's.
    passes = 2 + 1 / 3 + (kl != "none") / 3
    work = work_of(stage, Case(run, stage, tokenizer))
    assert work is not None and work.decode == pytest.approx(4 * 4 * flops / 3)
    assert work.rows == pytest.approx(4 * 4 * passes * flops)


def test_seconds(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.blocks, "wants_compile", lambda *_: False)
    run, stage = case_of(tmp_path, "pretrain", "sft", engine={"layout": "pp2"})
    work = work_of(stage, Case(run, stage, tokenizer))
    assert work is not None
    found = estimate(run, tokenizer, {"fp32": RATE}, 2, {"pretrain": 4})
    # Finished stages are left out; two micro-batches through two pipeline stages fill and drain.
    assert found == {"sft": pytest.approx(4.0 + 1.5 * work.rows / room.ROWS / RATE)}
    faster = estimate(run, tokenizer, {"fp32": 2 * RATE}, 2, {"pretrain": 4})
    assert faster["sft"] == pytest.approx((found["sft"] - 4.0) / 2 + 4.0)


def test_what_is_not_known_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run, stage = case_of(tmp_path, "sft", "reward", task=None, data={"sources": [
        {"kind": "preference-jsonl", "path": str(tmp_path / "no.jsonl")}]})  # fmt: skip
    assert work_of(stage, Case(run, stage, tokenizer)) is None
    found = estimate(run, tokenizer, {"fp32": RATE}, 1, {})
    assert found["reward"] is None and found["sft"] is not None
    text = expectation({"sft": 61.0, "reward": None}, {"fp32": RATE})
    assert "(1 GFLOP/s in fp32): about 1:01: sft 1:01; not reward" in text
    text = expectation({"reward": None}, {"fp32": RATE})
    assert text == "how long it takes cannot be told in advance, for the work of reward"
