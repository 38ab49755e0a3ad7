"""Stages on problems of the user's own: they learn, go on exactly, and notice another file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.config.load import load_config
from shardwise.errors import ConfigError, DataError
from shardwise.stages.evaluate import evaluate
from shardwise.stages.run import preflight, read_samples
from shardwise.verify.pool import RankError
from tests.stages.recipes import metrics, recipe, run, run_and_die, weights
from tests.support.pool import RankPool


def problems(folder: Path, number: int = 60) -> Path:
    """``bbbb17``: which letter? Prompts are texts and messages by turns, some answers are lists."""
    rows: list[dict[str, Any]] = []
    for i in range(number):
        letter = "abc"[i % 3]
        prompt = f"{letter * 4}{i}"
        rows.append({"prompt": prompt, "answer": letter, "level": i})
        if i % 2:
            rows[-1]["prompt"] = [{"role": "user", "content": prompt}]
        if i % 5 == 0:
            rows[-1]["answer"] = [letter, f"it is {letter}"]
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def on_file(folder: Path, *kinds: str, **top: Any) -> dict[str, Any]:
    """A recipe whose stages have the file's problems, and all defaults of such."""
    folder.parent.mkdir(exist_ok=True)
    task = {"kind": "file", "path": str(problems(folder.parent)), "held_out": 0.25}
    config = recipe(folder, *kinds, **top)
    for stage in config["stages"]:
        for name in ("num_problems", "num_held_out", "reward"):
            stage.pop(name, None)
        stage["task"] = task
    return config


@pytest.mark.slow
def test_it_learns_a_little(ranks: RankPool, tmp_path: Path) -> None:
    """SFT on answers, then GRPO: held-out accuracy beats the commonest answer; the reward grows."""
    config = on_file(tmp_path / "run", "sft", "grpo")
    task = config["stages"][0]["task"]
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def first(question, completion, answer, meta):\n"
        "    assert question == f'{answer * 4}{meta[\"level\"]}'\n"
        "    return float(completion[:1] == answer)\n"
    )
    sft, grpo = config["stages"]
    sft |= {"steps": 60, "batch": {"global_batch": 16, "micro_batch": 16, "seq_len": 48}}
    grpo |= {"steps": 12, "batch": {"global_batch": 8, "micro_batch": 8, "seq_len": 48}}
    sft["data"] = {"pack": False}
    grpo["reward"] = {"parts": [{"kind": "user", "function": f"{reward}:first"}]}
    grpo["optimizer"] = {"lr": 2e-3}
    sft["optimizer"] = {"lr": 5e-3}
    config["evaluations"] = [{"kind": "problems", "task": task, "max_new_tokens": 8}]
    [summary] = ranks.run(run, config, world=1)
    figures = summary["stages"][1]["metrics"]
    assert figures["num_problems"] == sum(1 for _ in _held_out(config))
    assert figures["accuracy"] > figures["majority_baseline"] + 0.2
    rewards = [r["reward_mean"] for r in metrics(tmp_path / "run") if "reward_mean" in r]
    assert len(rewards) == 12 and sum(rewards[6:]) > sum(rewards[:6]), rewards
    again = ranks.run(evaluate, tmp_path / "run" / summary["stages"][1]["checkpoint"], world=2)[0]
    assert again["accuracy"] == figures["accuracy"]


def _held_out(config: dict[str, Any]) -> Any:
    return load_config(config).config.stages[0].task.problems("held_out")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "grpo" else [pytest.mark.slow])
        for kind in ("grpo", "ppo", "online_dpo", "reward", "dpo")
    ],
)
def test_a_killed_run_goes_on_bitwise_and_notices_another_file(
    ranks: RankPool, tmp_path: Path, kind: str
) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    ranks.run(run, on_file(whole, kind), world=1)
    config = on_file(cut, kind)
    ranks.run(run_and_die, config, kind, 3, world=1)
    file = tmp_path / "b" / "problems.jsonl"
    before = file.read_text()
    file.write_text(before.replace('"answer": "c"', '"answer": "d"'))
    with pytest.raises(RankError, match=rf"{kind}: its checkpoints .* with another data"):
        ranks.run(run, config, world=1)
    file.write_text(before)
    ranks.run(run, config, world=1)
    for name, value in weights(whole, kind).items():
        torch.testing.assert_close(weights(cut, kind)[name], value, rtol=0, atol=0)


def test_defaults_beside_a_file(tmp_path: Path) -> None:
    run_ = load_config(on_file(tmp_path / "run", "sft", "reward", "dpo", "grpo")).config
    for stage in run_.stages:
        assert stage.num_problems is None  # type: ignore[attr-defined]
    assert run_.stages[3].reward.parts[0].kind == "answer"  # type: ignore[attr-defined]
    few = on_file(tmp_path / "run", "grpo")
    few["stages"][0]["num_problems"] = 5
    assert load_config(few).config.stages[0].num_problems == 5  # type: ignore[attr-defined]
    endless = recipe(tmp_path / "run", "grpo")
    endless["stages"][0]["num_problems"] = None
    with pytest.raises(ConfigError, match="num_problems: task count_letters has no end"):
        load_config(endless)


def test_bad_problems_stop_a_run_before_it_starts(tmp_path: Path) -> None:
    config = on_file(tmp_path / "run", "grpo")
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "z"}) + "\n")
    with pytest.raises(
        ConfigError, match=r"stages.0.task.path: .*problems.jsonl: line 61, .*'answer' is missing"
    ):
        preflight(load_config(config).config, 1)
    for prompt, message in (("x" * 200, "the prompt has"), ("<|im_end|>", "control token")):
        problems(tmp_path)
        with (tmp_path / "problems.jsonl").open("a") as file:
            file.write(json.dumps({"prompt": prompt, "answer": "y"}) + "\n")
        preflight(made := load_config(config).config, 1)
        with pytest.raises(DataError, match=rf"problems.jsonl: .*line 61, .*{message}"):
            read_samples(made)
    assert not (tmp_path / "run").exists()
