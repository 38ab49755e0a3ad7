"""FP8 layouts by Transformer Engine's stand-in, held by verify against one emulating process."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from shardwise.parallel.layout import parse_layout
from shardwise.verify import suite
from shardwise.verify.replay import Played, play
from shardwise.verify.run import SINGLE, Verifier
from shardwise.verify.tape import Tape
from tests.contracts.signatures import versions
from tests.contracts.transformer_engine import installed
from tests.support.pool import RankPool

# What the library computes as one, for recipes of tiles: their scales lie side by side, and are
# held by the gradients and by the layers behind.
FUSED = tuple(f".{name} " for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up"))


def play_by_library(release: str, fused: bool, tape: Tape, layout: str, *rest: Any) -> Played:
    """`play`, by the library on several ranks, and emulated on one."""
    place = parse_layout(layout, dist.get_world_size())
    if place.world == 1:
        played = play(tape, layout, *rest)
    else:
        with installed(release, part=dist.get_rank() % place.tp) as state:
            played = play(tape, layout, *rest)
        assert state.calls, "the library was not called"
    if fused:
        scales = played.scales.items()
        played.scales = {n: s for n, s in scales if not any(part in n for part in FUSED)}
    return played


class Library(RankPool):
    """Ranks of ``pool`` that find the library."""

    def __init__(self, pool: RankPool, fused: bool) -> None:
        self.pool, self.fused = pool, fused

    def run(self, fn: Any, *args: Any, **options: Any) -> list[Any]:
        if fn is play:
            release = versions("transformer_engine")[-1]
            return self.pool.run(play_by_library, release, self.fused, *args, **options)
        return self.pool.run(fn, *args, **options)


@pytest.mark.parametrize(
    "recipe,layouts",
    [
        ("delayed", ["tp2.sp", "dp2.zero2", "pp2.1f1b"]),
        ("current", ["tp2.sp"]),
        ("mxfp8", ["tp2", "dp2.zero3"]),
    ],
)
def test_verify(ranks: RankPool, recipe: str, layouts: list[str]) -> None:
    run = suite.recipe("llama")
    run["engine"] = run.get("engine", {}) | {
        "fp8": {"recipe": recipe, "amax_history_len": 2, "first_layers": 0, "last_layers": 0}
    }
    pool = Library(ranks, fused=recipe == "mxfp8")
    verifier = Verifier(run, [*layouts, SINGLE], pool)
    for layout in layouts:
        verdict = verifier.check("pretrain", layout)
        assert verdict.passed, f"{layout}: {verdict.sentence()}"
