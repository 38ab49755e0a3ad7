"""The default reward reads an answer where the style of the task has it."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.rewards import ProblemSet, RewardItem, build_reward, solution_text

MODEL = {
    "family": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2,
    "ffn_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("style", ["answer", "steps", "tags"])
@pytest.mark.parametrize(("kind", "stage"), [("arithmetic", "grpo"), ("countdown", "search")])
def test_a_reference_solution_earns_the_default_reward(style: str, kind: str, stage: str) -> None:
    task: dict[str, Any] = {"kind": kind, "style": style}
    if stage == "grpo":
        said: dict[str, Any] = {"kind": "grpo", "steps": 1, "samples_per_prompt": 2, "task": task}
    else:
        said = {"kind": "search", "task": task, "scorer": {"kind": "verifier"}}
    measured = {"kind": "problems", "task": task}
    run = load_config({"model": MODEL, "stages": [said], "evaluations": [measured]}).config
    for part in (run.stages[0], run.evaluations[0]):
        [problem, *_] = ProblemSet(part.task, "train_rl", 2)  # type: ignore[attr-defined]
        text = solution_text(problem, part.task)  # type: ignore[attr-defined]
        item = RewardItem(problem.question, text, problem.answer, problem.meta, 1)
        [found] = build_reward(part.reward).score([item])  # type: ignore[attr-defined]
        assert found.value == 1.0, text


def test_a_reward_that_is_given_stays() -> None:
    said = {"kind": "problems", "task": {"kind": "arithmetic", "style": "steps"}}
    given = {"parts": [{"kind": "exact"}]}
    run = load_config(
        {
            "model": MODEL,
            "stages": [{"kind": "pretrain", "steps": 1}],
            "evaluations": [said | {"reward": given}],
        }
    ).config
    assert run.evaluations[0].reward.parts[0].extract == "whole"  # type: ignore[attr-defined]
