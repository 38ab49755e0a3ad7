"""Dtypes as declared: by both engines, on every rank; a rounded master or sum is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwise.config.schema import NativeConfig
from shardwise.engines.base import Engine
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel import data
from shardwise.precision.policy import (
    PRECISIONS,
    DtypeCheck,
    multiplies_bf16,
    narrowest,
    narrowest_sum,
    resolve,
)
from tests.engines.test_plain import LR, packed, plain, setup
from tests.support import toy
from tests.support.pool import RankPool


def test_a_processors_bf16_says_nothing_of_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: True)
    assert multiplies_bf16(torch.device("cpu")) and multiplies_bf16(torch.device("xpu"))
    assert not multiplies_bf16(torch.device("meta"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve("auto", torch.device("cpu")) == "fp32"


def test_narrow_numbers_in_wide_memory_are_found() -> None:
    x = torch.randn(100, dtype=torch.float64)
    assert narrowest(x) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert narrowest(x.to(dtype).double()) == dtype
        assert narrowest(x.to(dtype)) == dtype
    # Numbers that say nothing: too few different ones.
    assert narrowest(torch.ones(100)) == torch.float32
    assert narrowest(torch.zeros(0)) == torch.float32


def test_small_sums_are_on_the_grid_of_fp16_whatever_summed_them() -> None:
    terms = [torch.rand(2, 100, generator=torch.Generator().manual_seed(n)).half() for n in (0, 1)]
    low, high = (5e-5 * term for term in terms)
    small = low.float() + high.float()
    assert narrowest(small) == torch.float16 and narrowest_sum(small) == torch.float32
    # Larger ones tell.
    assert narrowest_sum(terms[0].float() + terms[1].float()) == torch.float32
    assert narrowest_sum((terms[0] + terms[1]).float()) == torch.float16
    assert narrowest_sum(1e-3 * (terms[0] + terms[1])) == torch.float16
    mixed = torch.cat([small, (terms[0] + terms[1]).float()])
    assert narrowest_sum(mixed) == torch.float16


def watch(engine: Engine, check: DtypeCheck, rows: int = 2, learnt: int = 4) -> list[str]:
    """``learnt``: rows that have a loss, of four."""
    for update in range(3):
        batch = packed(4, seed=update)
        batch.loss_mask_BT[learnt:] = 0
        mine = batch.split(4 // engine.data_size)[engine.data_rank].split(rows)
        engine.forward_backward(mine, CausalLM())
        check.note(engine.dtypes())
        engine.step(LR)
    return [f"{kind}: {name}, {why}" for (kind, name), why in check.problems().items()]


def check_of(precision: str, wide: bool = False) -> DtypeCheck:
    return DtypeCheck(PRECISIONS[precision].declared(wide))


def native(
    layout: str, precision: str, wide: bool, bug: str = "", learnt: int = 4
) -> tuple[list[str], Any]:
    config = NativeConfig.model_validate(
        {"layout": layout, "precision": precision, "compile": False}
    )
    with pytest.MonkeyPatch.context() as patch:
        if bug == "reduced in the compute dtype":
            policy = data.MixedPrecisionPolicy
            patch.setattr(
                data, "MixedPrecisionPolicy", lambda **k: policy(**k | {"reduce_dtype": None})
            )
        engine: Any = build_engine(setup(toy.llama(), config, layout, wide_logits=wide))
        step = engine.step

        def rounding(lr: float) -> float:
            norm: float = step(lr)
            for _, weight in engine.held("weights"):
                weight.copy_(weight.bfloat16().to(weight.dtype))
            return norm

        if bug == "masters rounded":
            engine.step = rounding
        check = check_of(precision, wide)
        problems = watch(engine, check, learnt=learnt)
    return problems, {kind for kind, _ in check.widest}


KINDS = {"compute", "masters", "moments", "gradients", "reductions", "logits"}


@pytest.mark.parametrize(
    "layout,world", [("dp1", 1), ("dp2.zero0", 2), ("dp2.zero3", 2), ("tp2.sp", 2), ("pp2", 2)]
)
@pytest.mark.parametrize("precision,wide", [("bf16", False), ("bf16", True), ("fp64", False)])
def test_native_keeps_what_is_declared(
    ranks: RankPool, layout: str, world: int, precision: str, wide: bool
) -> None:
    kinds = set()
    for problems, found in ranks.run(native, layout, precision, wide, world=world):
        assert problems == []
        kinds |= found
    assert kinds == KINDS


def test_a_sum_of_one_term_may_be_narrow(ranks: RankPool) -> None:
    """The other rank's micro-batch has nothing to learn from."""
    for problems, _ in ranks.run(native, "dp2.zero3", "bf16", False, learnt=1, world=2):
        assert problems == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_keeps_what_is_declared(precision: str) -> None:
    wide = precision == "bf16"
    for split in ("whole", "rows"):
        check = check_of(precision, wide)
        assert watch(plain(toy.llama(), precision, wide_logits=wide, split=split), check) == []
        assert {kind for kind, _ in check.widest} == KINDS - {"reductions"}


@pytest.mark.parametrize("layout,world", [("dp1", 1), ("dp2.zero2", 2)])
def test_rounded_masters_are_told(ranks: RankPool, layout: str, world: int) -> None:
    for problems, _ in ranks.run(native, layout, "bf16", False, "masters rounded", world=world):
        assert any(
            p.startswith("masters: embed.weight, it is bfloat16, declared f") for p in problems
        )


def test_narrow_reductions_are_told(ranks: RankPool) -> None:
    for problems, _ in ranks.run(
        native, "dp2.zero2", "bf16", False, "reduced in the compute dtype", world=2
    ):
        told = {p.partition(":")[0] for p in problems}
        assert told >= {"reductions"}, problems
    assert check_of("bf16").problems() == {}
