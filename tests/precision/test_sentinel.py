"""The sentinel: its arithmetic, whom it looks at, what it does, and that all ranks agree."""

from __future__ import annotations

import functools
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardwise.config.schema import SentinelConfig
from shardwise.engines.native import NativeEngine
from shardwise.ops import fp8, fp8_linear
from shardwise.ops.fp8_linear import Site
from shardwise.parallel.layout import world_of
from shardwise.precision.sentinel import Look, Sentinel, look
from tests.precision import test_fp8
from tests.precision.test_fp8 import MODEL, OPTIMIZER, build
from tests.support.pool import RankPool

OUTLIER, LR = 1e6, 1e-3
step = functools.partial(test_fp8.step, lr=LR)


def test_what_a_look_says_of_its_sums() -> None:
    sums = [1.0, 100.0, 4.0, 16.0, 0.0, 0.0, 10.0, 5.0, 1.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    seen = look(sums, [8.0, 1.0, 0.0], [2.0, 1.0, 3.0])
    assert seen == Look(error=0.5, underflow=0.5, overflow=0.1, drift=2.0)
    assert look(sums, [8.0, 1.0, 1.0], None).drift is None


def test_limits() -> None:
    limits = SentinelConfig(max_error=0.2, max_underflow=0.3, max_overflow=0.02)
    assert Look(0.1, 0.1, 0.01, None).beyond(limits) == ""
    assert (
        Look(0.25, 0.1, 0.05, None).beyond(limits) == "error 0.25 over 0.2, overflow 0.05 over 0.02"
    )
    assert Look(math.nan, 0.0, 0.0, None).beyond(limits).startswith("error nan")


def test_layers_are_looked_at_in_turn() -> None:
    sentinel = Sentinel(SentinelConfig(every=10, layers=2), list("abc"))
    looked = [sentinel.chosen(step) for step in range(40)]
    assert [x for x in looked if x] == [["a", "b"], ["a", "c"], ["b", "c"], ["a", "b"]]
    assert [i for i, x in enumerate(looked) if x] == [9, 19, 29, 39]
    sentinel.fallen["b"] = 40
    assert sentinel.chosen(49) == ["a", "c"]
    off = Sentinel(SentinelConfig(every=1, enabled=False), ["a"])
    assert off.chosen(0) == []


def test_the_sums_of_a_layer_by_hand() -> None:
    x = torch.tensor([[448.0, 1.0, 1e-4, 0.0]], requires_grad=True)
    w = torch.ones(1, 4, requires_grad=True)
    tally = torch.zeros(fp8_linear.NUM_SUMS, dtype=torch.float64)
    site = Site("a", fp8.Recipe("current"), torch.ones(3), torch.zeros(3))
    site.watched, site.tally = True, tally
    site.linear(x, w, None).sum().backward()
    seen = look(tally.tolist(), site.amax_3.tolist(), None)
    # Of three elements that are not zero, 1e-4 becomes zero; nothing is cut off.
    assert seen.underflow == pytest.approx(1 / 3) and seen.overflow == 0.0
    assert seen.error == pytest.approx(1e-4 / math.hypot(448.0, 1.0, 1e-4), rel=0.1)


def test_what_is_cut_off_is_counted() -> None:
    x = torch.tensor([[448.0, 449.0, 1000.0, 1.0]], requires_grad=True)
    recipe = fp8.Recipe("delayed")
    tally = torch.zeros(fp8_linear.NUM_SUMS, dtype=torch.float64)
    site = Site("a", recipe, torch.ones(3), torch.zeros(3), calibrated=(True,) * 3)
    site.watched, site.tally = True, tally
    site.linear(x, torch.ones(1, 4), None).sum().backward()
    assert look(tally.tolist(), [1.0] * 3, None).overflow == 0.5


def test_what_is_carried_is_json() -> None:
    sentinel = Sentinel(SentinelConfig(every=1, layers=1), ["a"])
    site = Site("a", fp8.Recipe("current"), torch.ones(3), torch.zeros(3))
    sentinel.begin(0, {"a": site}, torch.device("cpu"))
    site.amax_3.copy_(torch.tensor([2.0, math.inf, math.nan]))
    alone: Any = SimpleNamespace(size=lambda: 1)
    sentinel.finish(0, {"a": site}, alone)
    assert sentinel.state_dict()["amax"] == {"a": [2.0, 0.0, 0.0]}
    json.dumps(sentinel.state_dict(), allow_nan=False)


# --- in the engine --------------------------------------------------------------------------------


def with_outlier(layout: str, recipe: str, planted: bool) -> dict[str, Any]:
    """Three steps with a look at the second, one input channel of a layer being huge."""
    sentinel = {"every": 2, "layers": 0}
    it: NativeEngine = build(layout, recipe, precision="fp64", fp8={"sentinel": sentinel})
    weight = it.named.parameters.get("layers.1.attn_norm.weight")
    if planted and weight is not None:
        local = weight.data.to_local() if hasattr(weight.data, "to_local") else weight.data
        local[3] = OUTLIER
    metrics = [step(it, n) for n in range(3)]
    state = it.state_dict().meta
    again: NativeEngine = build(layout, recipe, precision="fp64", fp8={"sentinel": sentinel})
    again.load_state_dict(state)
    assert it.fp8 is not None and again.fp8 is not None
    return {
        "metrics": [{n: v for n, v in m.items() if n.startswith("fp8")} for m in metrics],
        "events": [e for e in it.events() if e[0] != "fp8"],  # who computes is no look
        "fallen": state["fp8"]["sentinel"]["fallen"],
        "active": {p: s.active for p, s in it.fp8.sites.items()},
        "resumed": {p: s.active for p, s in again.fp8.sites.items()},
        "told_twice": it.events(),
    }


@pytest.mark.parametrize(
    "layout,recipe", [("dp1", "current"), ("tp2.sp", "current"), ("pp2", "current")]
)
def test_a_planted_outlier_channel_is_caught(ranks: RankPool, layout: str, recipe: str) -> None:
    results = ranks.run(with_outlier, layout, recipe, True, world=world_of(layout))
    for found in results:
        assert found["metrics"] == results[0]["metrics"]  # all ranks alike
        assert found["metrics"][0] == {} and found["metrics"][1]["fp8_underflow"] > 0.5
        fallen = found["fallen"]
        assert {f"layers.1.attn.{n}" for n in "qkv"} <= fallen.keys() and set(fallen.values()) == {
            2
        }
        assert not any(p.startswith("layers.2.mlp") for p in fallen)
        assert found["active"] == found["resumed"]
        assert found["active"] == {p: p not in fallen for p in found["active"]}
        kinds = {kind for kind, _ in found["events"]}
        assert kinds == {"fp8_fallback"} and len(found["events"]) == len(fallen)
        assert "underflow" in dict(reversed(found["events"]))["fp8_fallback"]
        assert found["told_twice"] == []


@pytest.mark.parametrize("recipe", ["delayed", "current", "block", "mxfp8"])
def test_a_sound_model_is_left_alone(ranks: RankPool, recipe: str) -> None:
    [found] = ranks.run(with_outlier, "dp1", recipe, False, world=1)
    assert found["fallen"] == {} and found["events"] == []
    assert found["metrics"][1]["fp8_fallbacks"] == 0.0
    assert 0.0 < found["metrics"][1]["fp8_error"] < 0.2


def as_bf16(fall: bool) -> list[float]:
    """Losses with every layer fallen, or with FP8 off."""
    it: NativeEngine = build("dp1", "current", precision="fp64")
    if fall:
        assert it.fp8 is not None
        it.fp8.sentinel.fallen = dict.fromkeys(it.fp8.layers, 1)
        it.fp8.sentinel.obey(it.fp8.sites)
    else:
        config = it.config.model_copy(update={"fp8": None})
        it = NativeEngine(MODEL, config, it.mesh, seed=7, stage="test", optimizer=OPTIMIZER)
    return [step(it, n)["loss"] for n in range(2)]


def test_a_layer_that_fell_computes_unquantised(ranks: RankPool) -> None:
    [fallen], [plain] = (ranks.run(as_bf16, fall, world=1) for fall in (True, False))
    assert fallen == plain
