"""What a model, a batch and an engine allow: every row of the table refuses, and only it."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.config.schema import Fp8Config
from shardwise.errors import ConfigError
from shardwise.parallel.feasible import REFUSALS, Case, check, nearest, refusal
from shardwise.parallel.layout import (
    CP_KINDS,
    SCHEDULES,
    SINGLE,
    V_SHAPED,
    Layout,
    parse_layout,
)
from shardwise.parallel.pipeline import program
from tests.support import toy

MODEL = toy.llama(num_layers=4)  # 4 heads, 2 of keys and values


def case(text: str, world: int, *, compiled: bool = False, batch: int = 8, micro: int = 1) -> Case:
    return Case(parse_layout(text, world), MODEL, compiled, batch, micro)


def fp8_case(
    text: str = "dp1",
    world: int = 1,
    *,
    compiled: bool = False,
    precision: str = "bf16",
    **fp8: Any,
) -> Case:
    model = toy.llama(num_layers=4, ffn_size=64)
    section = Fp8Config.model_validate(fp8)
    return Case(parse_layout(text, world), model, compiled, 8, 1, precision, section)


def fused_case(text: str = "dp1", world: int = 1, **changes: Any) -> Case:
    one = dataclasses.replace(case(text, world, batch=8, micro=8), fused="lomo")
    return dataclasses.replace(one, **changes)


ROWS = [
    ("_fused_pipeline", fused_case("pp2", 2), "optimizer.kind: lomo.*one backward pass"),
    ("_fused_batches", fused_case(micro_batch=2), "there are 4; set batch.micro_batch to 8"),
    ("_fused_clipping", fused_case(max_grad_norm=1.0), "engine.max_grad_norm: 1 .*set 0"),
    ("_fused_scaling", fused_case(precision="fp16"), "fp16 leaves updates out.*use bf16 or fp32"),
    (
        "_heads",
        Case(
            parse_layout("tp2", 2), toy.llama(num_heads=3, num_kv_heads=1, head_dim=8), False, 8, 1
        ),
        "tp2 does not divide num_heads 3; nearest: engine.layout=cp2.ring",
    ),
    (
        "_kv_heads",
        Case(
            parse_layout("tp4", 4), toy.llama(num_heads=12, num_kv_heads=6, head_dim=4), False, 8, 1
        ),
        "num_kv_heads 6; nearest: engine.layout=tp2.cp2.ring",
    ),
    ("_ulysses_heads", case("tp2.cp4.ulysses", 8), "2 heads.*nearest: engine.layout=tp2.cp4.ring"),
    (
        "_layers",
        case("pp4.v2.interleaved", 4),
        "8 pipeline stages.*num_layers 4; nearest: engine.layout=pp4.1f1b",
    ),
    (
        "_pipeline_batches",
        case("pp2.v2", 2, batch=5),
        "2 rounds, and 5 micro-batches.*nearest: engine.layout=pp2.1f1b",
    ),
    (
        "_pipeline_batches",
        case("pp2.dualpipev", 2, batch=3),
        "at least 4.*nearest: engine.layout=pp2.v2.interleaved",
    ),
    (
        "_compile_split",
        case("pp2.zbv", 2, compiled=True),
        "compile=false; nearest: engine.layout=pp2.v2.interleaved",
    ),
    ("_fp8_precision", fp8_case(precision="fp16"), "fp16 scales its loss.*use bf16"),
    ("_fp8_compile", fp8_case(compiled=True), "engine.compile: true.*use false or auto"),
    ("_fp8_modules", fp8_case(first_layers=3), "first_layers: 3 and last_layers 1 leave none"),
    ("_fp8_modules", fp8_case(modules=["layers.*.ffn.*"]), "modules: no linear.*mlp"),
    ("_fp8_widths", fp8_case(recipe="block"), "block needs output features.*128.*nearest: 128"),
    ("_fp8_widths", fp8_case("tp4", 4), "multiples of 16, and .* has 8 a rank of tp4.*nearest: 16"),
    ("_fp8_widths", fp8_case("tp2", 2, recipe="mxfp8"), "has 16 a rank of tp2.*nearest: 32"),
]


@pytest.mark.parametrize("row,refused,words", ROWS, ids=[f"{r[0]}-{r[1].layout}" for r in ROWS])
def test_each_row_refuses_with_the_numbers(row: str, refused: Case, words: str) -> None:
    assert [r.__name__ for r in REFUSALS if r(refused)] == [row]
    with pytest.raises(ConfigError, match=words):
        check(refused)


def test_a_precision_that_the_hardware_decides_is_not_refused() -> None:
    check(fp8_case(precision="auto"))


def test_every_row_has_its_case() -> None:
    assert {r.__name__ for r in REFUSALS} == {row for row, _, _ in ROWS}


@given(st.sampled_from(SCHEDULES), st.integers(2, 4), st.integers(2, 3), st.integers(1, 12))
def test_what_is_not_refused_has_a_complete_program(
    schedule: str, pp: int, virtual: int, num_microbatches: int
) -> None:
    """Each part sees each micro-batch forward and backward once, or the table refuses."""
    virtual = 1 if schedule in SINGLE else 2 if schedule in V_SHAPED else virtual
    layout = Layout(pp=pp, virtual=virtual, schedule=schedule)
    model = toy.llama(num_layers=12)
    try:
        check(Case(layout, model, False, num_microbatches, 1))
    except ConfigError:
        with pytest.raises(ValueError, match="microbatches"):
            program(layout, num_microbatches)
        return
    seen = [a for actions in program(layout, num_microbatches).actions for a in actions]
    assert len(seen) == len(set(seen))
    for part in range(layout.num_chunks):
        for m in range(num_microbatches):
            assert ("F", part, m) in seen
            assert ("B", part, m) in seen or {("I", part, m), ("W", part, m)} <= set(seen)
    assert {kind for kind, _, _ in seen} <= {
        "F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B",
    }  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout of the grammar, up to 256 ranks."""
    sizes = st.sampled_from([1, 1, 2, 3, 4])
    dp, tp, pp, cp = (draw(sizes) for _ in range(4))
    zero = draw(st.integers(0, 3))
    shard = draw(st.sampled_from([d for d in range(1, dp + 1) if dp % d == 0])) if zero else 1
    schedule = draw(st.sampled_from(SCHEDULES)) if pp > 1 else "1f1b"
    virtual = 1 if schedule in SINGLE else 2 if schedule in V_SHAPED else draw(st.integers(2, 4))
    kind = draw(st.sampled_from(CP_KINDS)) if cp > 1 else "ring"
    sp = tp > 1 and draw(st.booleans())
    return Layout(dp, shard, zero, tp, sp, pp, virtual, schedule, cp, kind)


@settings(max_examples=100, deadline=None)
@given(layouts(), st.data())
def test_what_is_offered_passes_every_row_and_changes_no_training(
    layout: Layout, data: st.DataObject
) -> None:
    """For any model and batches, on as many ranks, or on any other number of them."""
    kv = data.draw(st.integers(1, 8))
    heads = kv * data.draw(st.integers(1, 4))
    layers = data.draw(st.integers(1, 12))
    model = toy.llama(num_heads=heads, num_kv_heads=kv, head_dim=16, num_layers=layers)
    batches = data.draw(st.lists(st.integers(1, 96), min_size=1, max_size=3))
    micro = data.draw(st.integers(1, 4))
    fp8 = data.draw(st.sampled_from([None, Fp8Config(first_layers=0, last_layers=0)]))
    compiled = fp8 is None and data.draw(st.booleans())
    cases = [Case(layout, model, compiled, b, micro, "bf16", fp8) for b in batches]
    world = data.draw(st.sampled_from([layout.world, layout.world, 1, 2, 4, 6, 8, 12]))
    near = nearest(cases, world)
    if world == layout.world and not any(map(refusal, cases)):
        assert near == layout
    try:
        check(*cases)
    except ConfigError as error:
        offered = re.search(r"nearest: engine.layout=(\S+)", str(error))
        own = nearest(cases, layout.world)
        assert fp8 is not None or (offered is None) == (own is None)
        assert offered is None or parse_layout(offered[1], layout.world) == own
    if near is None:
        return
    assert near.world == world and parse_layout(str(near), world) == near
    assert near.zero == layout.zero
    for case in cases:
        moved = dataclasses.replace(case, layout=near)
        assert refusal(moved) is None
        counts = [c.num_microbatches * c.layout.dp for c in (case, moved)]
        assert counts[0] == counts[1]
        if near.dp == layout.dp:
            assert case.num_microbatches == moved.num_microbatches
        if fp8 is not None:
            assert (near.tp, near.cp) == (layout.tp, layout.cp)


def test_where_no_layout_can_be_none_is_offered() -> None:
    model = toy.llama(num_layers=1, num_heads=3, num_kv_heads=3, head_dim=8)
    odd = Case(parse_layout("tp2.cp4.ulysses", 8), model, False, 8, 1)
    assert str(nearest([odd], 8)) == "cp8.ring"
    fp8 = dataclasses.replace(odd, fp8=Fp8Config(first_layers=0, last_layers=0))
    with pytest.raises(ConfigError, match="no layout of 8 ranks computes the same training"):
        check(fp8)
