"""Weighted sums, unscorable parts, and what a config may say."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from shardwise.rewards import RewardConfig, RewardItem, build_reward

GOOD = "<think>2 and 2</think><answer>4</answer>"


def score(parts: list[dict[str, object]], text: str = GOOD, answer: str = "4", **item: object):  # type: ignore[no-untyped-def]
    with build_reward(RewardConfig.model_validate({"parts": parts})) as scorer:
        return scorer.score([RewardItem("2+2?", text, answer, **item)])[0]  # type: ignore[arg-type]


def test_a_weighted_sum() -> None:
    parts: list[dict[str, object]] = [
        {"kind": "exact", "extract": "tag", "weight": 2.0},
        {"kind": "numeric", "extract": "tag", "weight": 0.5},
        {"kind": "format", "weight": 0.25},
        {"kind": "language", "weight": 0.125},
        {"kind": "length", "max_tokens": 10, "buffer_tokens": 5},
    ]
    result = score(parts, num_tokens=8)
    assert result.value == pytest.approx(2.0 + 0.5 + 0.25 + 0.125 - 3 / 5)
    assert result.parts["length"] == pytest.approx(-3 / 5) and result.reason == ""
    assert build_reward(RewardConfig.model_validate({"parts": parts})).maximum == 2.875


def test_the_default_is_exact_match() -> None:
    with build_reward(RewardConfig()) as scorer:
        found = scorer.score([RewardItem("q", t, "4") for t in (" 4", "5", "")])
    assert [r.value for r in found] == [1.0, 0.0, 0.0]


def test_one_unscorable_part_makes_the_item_unscorable() -> None:
    result = score([{"kind": "exact"}, {"kind": "numeric"}], answer="four")
    assert result.value is None
    assert result.parts == {"exact": 0.0, "numeric": None}
    assert result.reason == "numeric: the reference answer is not a number"
    assert "token count" in score([{"kind": "length", "max_tokens": 4, "buffer_tokens": 2}]).reason


def test_parts_of_one_kind_keep_their_names() -> None:
    result = score([{"kind": "exact"}, {"kind": "exact", "extract": "tag"}])
    assert result.parts == {"exact_0": 0.0, "exact_1": 1.0} and result.value == 1.0


def test_a_sum_without_bound_is_unscorable() -> None:
    huge: dict[str, object] = {"kind": "exact", "extract": "tag", "weight": 1e12}
    result = score([huge, huge])
    assert result.value is None and result.reason.startswith("the sum is 2e+12; more than")


def test_a_user_function_beside_a_verifier(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def brevity(question, completion, answer, meta): return 1 / len(completion)")
    parts: list[dict[str, object]] = [
        {"kind": "user", "function": f"{path}:brevity"},
        {"kind": "numeric"},
    ]
    result = score(parts, text="4")
    assert result.value == 2.0 and result.parts == {"brevity": 1.0, "numeric": 1.0}
    result = score(parts, text="")
    assert result.value is None and "ZeroDivisionError" in result.reason


@pytest.mark.parametrize(
    "part",
    [
        {"kind": "exakt"},
        {"kind": "exact", "veight": 1},
        {"kind": "language", "language": "xx"},
        {"kind": "length", "max_tokens": 4, "buffer_tokens": 5},
        {"kind": "user", "function": "reward"},
    ],
)
def test_wrong_configs(part: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RewardConfig.model_validate({"parts": [part]})


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("so it is 42.", "42", True),
        ("42 or 43", "42", False),
        ("\\boxed{1/2}, not 7", "0.5", True),
        ("<answer>4</answer> 5", "4", True),
        ("4 <answer>5", "4", False),
        ("I think.\nAnswer: Paris", "paris", True),
        ("paris", "Paris", True),
        ("It is Paris.", "Paris", False),
        ("none at all", "3", False),
    ],
)
def test_an_answer_in_whichever_way_it_is_marked(text: str, answer: str, right: bool) -> None:
    assert score([{"kind": "answer"}], text, answer).value == float(right)


def test_any_of_several_answers_is_right(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        "def all_of(q, c, answer, meta):\n    return len(meta['answers']) + (answer == 'a')"
    )
    for parts, text, value in (
        ([{"kind": "exact"}], "b", 1.0),
        ([{"kind": "exact"}], "c", 0.0),
        ([{"kind": "numeric"}], "it is 7", 1.0),
        ([{"kind": "user", "function": f"{file}:all_of"}], "", 4.0),
    ):
        assert score(parts, text, "a", others=("b", "7")).value == value
