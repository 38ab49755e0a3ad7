"""Lines that round to 16 bits or sum in them: found by place, and told unless declared."""

from __future__ import annotations

import math

import torch
from torch import nn

from shardwise.ops import attention_blocks
from shardwise.precision.policy import ROUNDED
from shardwise.verify.roundings import Lines, Roundings, undeclared_lines

MERGE = "ops/attention_blocks.py merge"


def merged(dtype: torch.dtype) -> Lines:
    lines: Lines = {}
    out, lse = torch.zeros(1, 1, 2, 4, dtype=dtype), torch.full((1, 1, 2), -math.inf)
    with Roundings(lines, []):
        attention_blocks.merge(out, lse, torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 2))
    return lines


def test_a_sum_in_bf16_is_found_and_one_in_fp32_is_not() -> None:
    assert merged(torch.float32) == {}
    found = merged(torch.bfloat16)
    assert {("sums", MERGE), ("rounds", MERGE)} == set(found)
    told = undeclared_lines({}, [{}, found])
    assert any(MERGE in words and "sums" in words for words in told)
    assert set(told.values()) == {(1,)}


def test_what_one_process_does_at_the_same_lines_is_the_precision_itself() -> None:
    found = merged(torch.bfloat16)
    assert not undeclared_lines(found, [found])


def test_as_many_lines_as_are_declared() -> None:
    place = "parallel/context.py _RingAttention.backward"
    assert ROUNDED[f"rounds {place}"] == 1
    assert not undeclared_lines({}, [{("rounds", place): {7}}])
    assert undeclared_lines({}, [{("rounds", place): {7, 8}}])
    assert undeclared_lines({}, [{("sums", place): {7}}])


def test_gradients_of_a_weight_that_is_used_once_are_summed_in_fp32() -> None:
    layer = nn.Linear(3, 3, bias=False, dtype=torch.bfloat16)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    lines: Lines = {}
    with Roundings(lines, [layer]):
        layer(x).sum().backward()
        assert not lines
        layer(x).sum().backward()  # on top of the first
    assert {("sums", "a weight's gradient")} == set(lines)
