"""FP8 layouts by Transformer Engine's stand-in, held by verify against one emulating process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from shardwise.parallel.layout import parse_layout
from shardwise.precision.transformer_engine import TransformerEngine
from shardwise.verify import suite
from shardwise.verify.verifier import Verifier
from shardwise.verify.walk import Task, Walked, walk
from tests.contracts.signatures import versions
from tests.contracts.transformer_engine import installed
from tests.support.pool import RankPool

# What the library computes as one, for recipes of tiles: their scales lie side by side, and are
# held by the gradients and by the layers behind.
FUSED = tuple(f".{name} " for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"))


def walk_by_library(release: str, fused: bool, task: Task) -> Walked:
    """`walk`, by the library on several ranks, and emulated on one."""
    place = parse_layout(task.layout, dist.get_world_size())
    if place.world == 1:
        walked = walk(task)
    else:
        with installed(release, part=dist.get_rank() % place.tp) as state:
            walked = walk(task)
        assert state.calls, "the library was not called"
    if fused:
        scales = walked.scales.items()
        walked.scales = {n: s for n, s in scales if not any(part in n for part in FUSED)}
    return walked


def lose_the_amax_group(*args: Any) -> Walked:
    """The same, but that each rank keeps its amaxes to itself."""
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    build = TransformerEngine.__init__

    def wrong(self: TransformerEngine, *given: Any) -> None:
        build(self, *given)
        self.amax_group = alone

    with mock.patch.object(TransformerEngine, "__init__", wrong):
        return walk_by_library(*args)


class Library(RankPool):
    """Ranks of ``pool`` that find the library."""

    def __init__(self, pool: RankPool, fused: bool) -> None:
        self.pool, self.fused = pool, fused

    def run(self, fn: Any, *args: Any, **options: Any) -> list[Any]:
        if fn is walk:
            release = versions("transformer_engine")[-1]
            return self.pool.run(walk_by_library, release, self.fused, *args, **options)
        return self.pool.run(fn, *args, **options)


def verifier(ranks: RankPool, recipe: str) -> Verifier:
    run = suite.recipe("llama")
    run["engine"] |= {
        "fp8": {"recipe": recipe, "amax_history_len": 2, "first_layers": 0, "last_layers": 0}
    }
    return Verifier(run, Library(ranks, fused=recipe == "mxfp8"))


@pytest.mark.parametrize(
    "recipe,layouts",
    [
        pytest.param("delayed", ["tp2.sp"], marks=pytest.mark.slow),
        pytest.param("mxfp8", ["dp2.zero3"], marks=pytest.mark.slow),
        pytest.param("delayed", ["dp2.zero2", "pp2.1f1b"], marks=pytest.mark.slow),
        pytest.param("current", ["tp2.sp"], marks=pytest.mark.slow),
        pytest.param("mxfp8", ["tp2"], marks=pytest.mark.slow),
    ],
)
def test_verify(ranks: RankPool, recipe: str, layouts: list[str]) -> None:
    mine = verifier(ranks, recipe)
    for layout in layouts:
        verdict = mine.check("pretrain", layout)
        assert verdict.passed, f"{layout}: {verdict.sentence()}"


def test_an_amax_that_is_not_shared_is_caught(ranks: RankPool) -> None:
    mine = verifier(ranks, "delayed")
    small = mine.small("pretrain", "tp2.sp")
    task = mine.task(small, "tp2.sp", "fp64")
    release = versions("transformer_engine")[-1]
    walked = ranks.run(lose_the_amax_group, release, False, task, world=2, timeout=180)
    found = [d for d in mine.judge(small, "tp2.sp", "fp64", walked) if d.is_bug]
    assert found and found[0].kind == "history"
