"""FP8 from the papers: casts and scales by their definitions, and beside the native engine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.config.schema import Fp8Config, NativeConfig
from shardwise.engines.base import Engine, Scaled
from shardwise.engines.plain_fp8 import (
    E4M3,
    E5M2,
    Layer,
    Recipe,
    amax,
    block_scale,
    cast,
    mx_exponent,
    power_of_two,
    tensor_scale,
)
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from tests.engines.test_plain import LR, packed, plain, setup
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool

RECIPES = ("delayed", "current", "block", "mxfp8")
FORMATS = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


# --- definitions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_casts_hit_the_nearest_of_all_codes(kind: Any) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FORMATS[kind]).float()
    codes = codes[codes.isfinite()].unique()
    assert codes.max() == kind.maximum
    x = torch.cat([codes, (codes[1:] + codes[:-1]) / 2, torch.randn(4000) * 30])
    x = torch.cat([x, torch.randn(4000) * 2.0**-9, torch.randn(2000) * 1e5, torch.zeros(1)])
    assert torch.equal(cast(codes, kind), codes)
    found = cast(x, kind)
    assert torch.isin(found, codes).all()
    inside = x.clamp(-kind.maximum, kind.maximum)
    nearest = (inside[:, None] - codes).abs().min(dim=1).values
    assert torch.equal((found - inside).abs(), nearest)
    # A tie goes to the code whose last bit is 0, which is how hardware rounds.
    assert torch.equal(found, inside.to(FORMATS[kind]).float())
    strange = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(cast(strange, kind)[:2], torch.tensor([kind.maximum, -kind.maximum]))
    assert cast(strange, kind)[2].isnan()


def test_scales_by_their_definitions() -> None:
    values = torch.tensor([3.0, 0.0, torch.inf, torch.nan, 1e-40])
    found = tensor_scale(values, E4M3, margin=1)
    assert found.tolist() == [
        pytest.approx(448 / 2 / 3), 1.0, 1.0, 1.0, torch.finfo(torch.float32).max,
    ]  # fmt: skip
    assert block_scale(torch.tensor([1.0, 448.0, 449.0, 0.0]), E4M3).tolist() == [256, 1, 0.5, 1]
    exponents = mx_exponent(torch.tensor([448.0, 449.0, 224.0, 0.0, torch.inf, 1e-45]), E4M3)
    assert exponents.tolist() == [0, 1, -1, -127, 127, -127]
    powers = torch.arange(-127, 128)
    assert power_of_two(powers).tolist() == [2.0**e for e in powers.tolist()]


@pytest.mark.parametrize("compute", ["max", "most_recent"])
def test_a_history_forgets(compute: Any) -> None:
    config = Fp8Config(recipe="delayed", amax_history_len=3, margin=1, amax_compute=compute)
    layer = Layer("a", Recipe(config), torch.device("cpu"))
    assert not layer.known(0)
    scales = []
    for value in (4.0, 8.0, 0.0, 2.0, 1.0, torch.inf, 1.0):
        layer.amax_3 = torch.tensor([value, 1.0, 1.0])
        layer.end_update()
        scales.append(224 / float(layer.scale_3[0]))
    # An amax of 0 was not seen. An infinity says nothing, and hides what is beside it.
    wanted = {"max": [4, 8, 8, 8, 8, 8, 8], "most_recent": [4, 8, 8, 2, 1, 1, 1]}
    assert scales == wanted[compute]
    assert layer.known(0) and layer.history_H3[:, 0].tolist() == [0.0, torch.inf, 1.0]


def test_tiles_lie_along_what_a_product_sums_over() -> None:
    x = torch.randn(130, 200)
    recipe = Recipe(Fp8Config(recipe="block"))
    assert recipe.quantise(x, "x").inverse.shape == (130, 2)
    assert recipe.across(recipe.quantise(x, "x"), x, "x").inverse.shape == (200, 2)
    w = recipe.quantise(x, "w")
    assert w.inverse.shape == (2, 2) and torch.equal(recipe.across(w, x, "w").inverse, w.inverse.T)
    assert Recipe(Fp8Config(recipe="mxfp8")).quantise(x, "g").inverse.shape == (130, 7)
    for kind in RECIPES:
        q = Recipe(Fp8Config.model_validate({"recipe": kind})).quantise(x, "x")
        assert float((q.codes_RK * q.spread() - x).abs().max()) < float(amax(x)) / 16


# --- beside native --------------------------------------------------------------------------------


def model(heads: int = 2) -> Any:
    return toy.llama(hidden_size=256, num_layers=3, num_heads=4, num_kv_heads=heads, ffn_size=256)


def scaled(engine: Engine, micro: int) -> dict[str, Any]:
    """What three updates scaled by, by the names of `verify`; histories, metrics and weights."""
    found: dict[str, Any] = {"metrics": []}
    passes: Counter[tuple[int, str, int]] = Counter()
    share = 4 // engine.data_size

    def note(seen: Scaled) -> None:
        key = (update, seen.path, seen.part)
        number = engine.data_rank * share // micro + passes[key]
        passes[key] += 1
        name = f"{update} {seen.path} micro-batch {number} part {seen.part}"
        found[f"amax/{name}"] = seen.amax_3.clone()
        for operand, scale_inv in seen.scale_inv.items():
            found[f"scale/{name} {operand}"] = scale_inv.float().clone()

    for update in range(3):
        # A length that no layout divides: padding is scaled, too.
        rows = packed(4, 21, seed=update).split(share)[engine.data_rank].split(micro)
        with engine.watch_scales(note):
            found["metrics"].append(engine.forward_backward(rows, CausalLM()))
        found |= {f"history/{update} {n}": t.clone() for n, t in engine.scales()}
        engine.step(LR)
    found |= {f"weight/{n}": t.clone() for n, t in engine.full("weights")}
    return found


def native(layout: str, fp8: dict[str, Any], precision: str, heads: int) -> dict[str, Any]:
    config = NativeConfig.model_validate(
        {"layout": layout, "precision": precision, "compile": False, "fp8": fp8}
    )
    return scaled(build_engine(setup(model(heads), config, layout)), 2)


def assert_same(ranks: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    names = {n for found in ranks for n in found}
    assert names == set(wanted)
    for found in ranks:
        for name, value in found.items():
            if name == "metrics":
                for a, b in zip(value, wanted[name], strict=True):
                    assert a == pytest.approx(b, rel=1e-8)
            elif name.startswith("weight/"):
                assert (value - wanted[name]).norm() < 1e-9 * wanted[name].norm(), name
            else:
                assert torch.equal(value, wanted[name]), name


# Between the errors of the layers that are looked at.
MAX_ERROR = {"delayed": 0.1, "current": 0.052, "block": 0.0345, "mxfp8": 0.0345}
CASES = [
    ("delayed", "dp2.zero2", 2),
    ("delayed", "pp2", 2),
    ("delayed", "tp2.sp", 2),
    ("delayed", "cp2.ring", 2),
    ("current", "dp1", 2),
    ("current", "tp2", 1),
    ("current", "cp2.ring", 2),
    ("block", "tp2.sp", 2),
    ("block", "cp2.ulysses", 2),
    ("mxfp8", "tp2.sp", 2),
    ("mxfp8", "cp2.ulysses", 2),
]


@pytest.mark.parametrize("recipe,layout,heads", daily(CASES, 1, 2, 6, 8, 9))
def test_native_scales_alike_bit_for_bit(
    ranks: RankPool, recipe: str, layout: str, heads: int
) -> None:
    sentinel = {"every": 2, "layers": 5, "max_error": MAX_ERROR[recipe]}
    fp8 = {"recipe": recipe, "amax_history_len": 2, "sentinel": sentinel}
    world = 1 if layout == "dp1" else 2
    found = ranks.run(native, layout, fp8, "fp64", heads, world=world)
    engine = plain(model(heads), fp8=fp8, domains=layout)
    wanted = scaled(engine, 2)
    assert len(wanted) > 100 and engine.fp8 is not None
    assert_same(found, wanted)
    assert "fp8_error" in wanted["metrics"][1]
    assert 0 < len(engine.fp8.fallen) < 5


def lost(found: dict[str, Any], exact: dict[str, Any]) -> float:
    return max(
        float((v.double() - exact[n].double()).norm() / exact[n].double().norm())
        for n, v in found.items()
        if isinstance(v, Tensor) and n.startswith("weight/")
    )


def test_in_working_precision_both_lose_as_much(ranks: RankPool) -> None:
    fp8 = {"recipe": "delayed"}
    exact = scaled(plain(model(), fp8=fp8), 2)
    [found] = ranks.run(native, "dp1", fp8, "bf16", 2, world=1)
    oracle = scaled(plain(model(), "bf16", fp8=fp8), 2)
    assert 0 < lost(found, exact) < 2 * lost(oracle, exact)
    assert 0 < lost(oracle, exact) < 2 * lost(found, exact)
