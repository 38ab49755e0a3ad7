"""Verify verified: every planted bug is caught, and named.

That nothing is flagged without them is what `test_suite` shows, of the same layouts and recipes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from shardwise.models import registry
from shardwise.rollout import native
from shardwise.rollout.native import NativeBackend
from shardwise.rollout.sampling import Choice
from shardwise.verify import suite
from shardwise.verify.pool import RankError
from shardwise.verify.roles import world_of
from shardwise.verify.verifier import SINGLE, Verifier
from shardwise.verify.walk import Task, Walked, walk
from tests.support.pool import RankPool
from tests.verify.bugs import BUGS, walk_with

# What the first differing value must be, for bugs that a careless check would see too late.
FIRST = {
    "initial_weights_drawn_by_local_shape": "initial",
    "ring_gradient_by_each_blocks_own_softmax": "gradient",
    "clipping_by_a_local_norm": "clip norm",
    "reference_that_is_another_model": "initial",
    "loss_counted_on_every_tensor_rank": "loss",
    "generator_with_stale_weights": "sent weights",
}
DEAR = ("reference_that_is_another_model", "generator_with_stale_weights")


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[dict[str, Verifier]]:
    made = {m: Verifier(suite.recipe(m), ranks) for m in suite.MODELS}
    yield made
    for verifier in made.values():
        verifier.close()


# Daily those of which it is known what differs first and that are cheap; the others' kinds are held
# daily by edits of the source (`test_edited_bugs`).
DAILY = FIRST.keys() - set(DEAR)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DAILY else [pytest.mark.slow]) for n in BUGS]
)
def test_planted_bug_is_caught(name: str, verifiers: dict[str, Verifier], ranks: RankPool) -> None:
    bug = BUGS[name]
    verifier = verifiers[bug.model]
    small = verifier.small(bug.stage, bug.layout)
    task = verifier.task(small, bug.layout, "fp64")
    found = ranks.run(walk_with, name, task, world=world_of(bug.layout))
    wrong = [d for d in verifier.judge(small, bug.layout, "fp64", found) if d.is_bug]
    assert wrong
    if name in FIRST:
        assert wrong[0].kind.startswith(FIRST[name])


def test_there_are_enough_kinds() -> None:
    assert len(BUGS) >= 20


def wrong_at_decoding(kind: str, task: Task) -> Walked:
    """`walk.walk` in a rank whose compiled decoder is wrong: in its steps, or in its choice."""
    real = getattr(NativeBackend, kind)

    def forward(self: Any, rows: Any) -> Tensor:
        return real(self, rows) * 1.01  # type: ignore[no-any-return]

    def choose(self: Any, *args: Any) -> Choice:
        token_N, logp_N, *rest = real(self, *args)
        return token_N, logp_N - 1e-3, *rest

    with mock.patch.object(NativeBackend, kind, {"forward": forward, "choose": choose}[kind]):
        return walk(task)


@pytest.mark.slow
def test_a_wrong_compiled_decoder_is_caught(ranks: RankPool) -> None:
    """Rollouts of verify are served by what serves those of training."""
    recipe = suite.recipe("llama")
    recipe["model"] |= {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1}
    verifier = Verifier(recipe, ranks)
    small = verifier.small("grpo", SINGLE)
    model = registry.build(small.run.model)
    if why_not := native.unavailable(model, torch.float32, torch.device("cpu")):
        pytest.skip(why_not)
    assert verifier.check("grpo", SINGLE).passed
    task = verifier.task(small, SINGLE, "fp64")
    with pytest.raises(RankError, match="native step's logits differ"):
        ranks.run(wrong_at_decoding, "forward", task, world=1)
    found = ranks.run(wrong_at_decoding, "choose", task, world=1)
    wrong = [d for d in verifier.judge(small, SINGLE, "fp64", found) if d.is_bug]
    assert [d.kind for d in wrong] == ["generated logprobs"] * 2
    verifier.close()
