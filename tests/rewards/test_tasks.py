"""Splits that cannot overlap, whatever the seed and the sizes; equal difficulty; rendering."""

from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from shardwise.errors import ConfigError
from shardwise.rewards.task_configs import AnyTask, CountLettersConfig, TaskConfig, split_of
from shardwise.rewards.tasks import (
    ProblemSet,
    majority_baseline,
    messages,
    prompt_messages,
)


def task(**settings: object) -> TaskConfig:
    """A task as a recipe has it."""
    found: TaskConfig = TypeAdapter(AnyTask).validate_json(json.dumps(settings), strict=True)
    return found


SPLITS = ("train_sft", "train_rl", "held_out")


@pytest.mark.parametrize("kind", ["count_letters", "arithmetic", "countdown", "sudoku"])
def test_splits_are_disjoint_across_seeds(kind: str) -> None:
    questions = {
        split: {
            p.question
            for seed in (0, 1)
            for p in ProblemSet(task(kind=kind, seed=seed), split, 300)
        }
        for split in SPLITS
    }
    assert not questions["held_out"] & (questions["train_sft"] | questions["train_rl"])
    assert not questions["train_sft"] & questions["train_rl"]


def test_a_split_is_a_function_of_the_question() -> None:
    for split in SPLITS:
        assert all(
            split_of(p.question) == split for p in ProblemSet(CountLettersConfig(), split, 50)
        )


def test_longer_sets_start_with_shorter_ones_and_hold_no_duplicates() -> None:
    short, long = (ProblemSet(CountLettersConfig(), "held_out", n) for n in (20, 200))
    assert long[:20] == list(short)
    assert len({p.question for p in long}) == len(long) == 200


def test_splits_are_equally_hard() -> None:
    """Mean length and the majority baseline differ by sampling noise alone (5 sigma)."""
    num = 1500
    sets = [ProblemSet(CountLettersConfig(), split, num) for split in SPLITS]
    lengths = [sum(p.meta["length"] for p in s) / num for s in sets]
    sigma = (((14 - 6 + 1) ** 2 - 1) / 12 / num) ** 0.5
    assert max(lengths) - min(lengths) < 5 * 2**0.5 * sigma
    shares = [majority_baseline(s) for s in sets]
    assert max(shares) - min(shares) < 5 * 2**0.5 * (0.25 / num) ** 0.5
    assert all(0.18 < share < 0.28 for share in shares)


def test_an_exhausted_task_is_an_error() -> None:
    tiny = CountLettersConfig(min_length=1, max_length=1, letters="ab")
    with pytest.raises(ConfigError, match=r"only \d+ distinct problems.*widen the task"):
        ProblemSet(tiny, "train_rl", 100)


def test_majority_baseline() -> None:
    problems = ProblemSet(CountLettersConfig(), "held_out", 10)
    best = max([p.answer for p in problems].count(str(n)) for n in range(15))
    assert majority_baseline(problems) == best / 10
    with pytest.raises(ValueError, match="at least one"):
        majority_baseline([])


def test_rendering() -> None:
    problem = ProblemSet(CountLettersConfig(), "held_out", 1)[0]
    steps = problem.meta["steps"]
    said = {
        "answer": problem.answer,
        "steps": f"{steps}\nAnswer: {problem.answer}",
        "tags": f"<think>{steps}</think><answer>{problem.answer}</answer>",
    }
    for style, text in said.items():
        config = CountLettersConfig(style=style, system="Be brief.")
        conversation = messages(problem, config)
        assert [m["role"] for m in conversation] == ["system", "user", "assistant"]
        assert conversation[-1]["content"] == text
        assert conversation[:-1] == prompt_messages(problem, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_length": 5, "max_length": 4}, "min_length must not exceed"),
        ({"kind": "arithmetic", "min_digits": 5}, "min_digits must not exceed"),
        ({"kind": "arithmetic", "letters": "xyz"}, "letters"),
        ({"kind": "nope"}, "does not match any of the expected tags"),
        ({"kind": "reasoning_gym"}, "say which reasoning-gym dataset"),
        ({"kind": "reasoning_gym", "name": "x", "style": "tags"}, "has no steps"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        task(**settings)


# As runs kept it while all kinds shared their keys, each with its default.
OLD = {
    "kind": "arithmetic", "seed": 3, "style": "answer", "system": None, "min_length": 6,
    "max_length": 14, "letters": "abc", "targets": "", "operations": ["add"], "min_digits": 1,
    "max_digits": 3, "chain_length": 3, "name": "", "options": {},
}  # fmt: skip


def test_a_recipe_of_before_means_the_same_and_is_the_same_lineage() -> None:
    old = task(**OLD)
    assert old == task(kind="arithmetic", seed=3, operations=["add"], max_digits=3)
    assert json.dumps(old.identity()) == json.dumps(OLD)
    assert set(old.model_dump()) < set(OLD)
