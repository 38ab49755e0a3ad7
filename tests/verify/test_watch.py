"""What is noted of plain data."""

from __future__ import annotations

import dataclasses

from shardwise.rollout.sequences import Completion
from shardwise.verify.watch import numbers_of

COMPLETION = Completion(
    3, 0, (5,), [7, 8], [-1.0, -2.0], [-1.0, -2.0], "stop", policies=[("one", 1), ("two", 1)]
)


def test_checksums_of_weights_are_a_layouts_own() -> None:
    """fp64 weights that differ in the last bit may be another number in fp32."""
    other = dataclasses.replace(COMPLETION, policies=[("uno", 1), ("due", 1)])
    assert numbers_of([other]) == numbers_of([COMPLETION])


def test_all_else_is_compared() -> None:
    for changed in (
        {"policies": [("one", 2)]},
        {"token_ids": [7, 9]},
        {"finish_reason": "length"},
        {"logprobs": [-1.0, -2.5]},
    ):
        assert numbers_of(dataclasses.replace(COMPLETION, **changed)) != numbers_of(COMPLETION)
