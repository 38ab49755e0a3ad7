"""What a model, a batch and an engine allow: every row of the table refuses, and only it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.schema import Fp8Config
from shardwise.errors import ConfigError
from shardwise.parallel.feasible import REFUSALS, Case, check
from shardwise.parallel.layout import SCHEDULES, SINGLE, V_SHAPED, Layout, parse_layout
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


ROWS = [
    (
        "_heads",
        Case(
            parse_layout("tp2", 2), toy.llama(num_heads=3, num_kv_heads=1, head_dim=8), False, 8, 1
        ),
        "tp2 does not divide num_heads 3; nearest: dp1",
    ),
    (
        "_kv_heads",
        Case(
            parse_layout("tp4", 4), toy.llama(num_heads=12, num_kv_heads=6, head_dim=4), False, 8, 1
        ),
        "num_kv_heads 6; nearest: tp3",
    ),
    ("_ulysses_heads", case("tp2.cp4.ulysses", 8), "2 heads.*nearest: tp2.cp4.ring"),
    ("_layers", case("pp4.v2.interleaved", 4), "8 pipeline stages.*num_layers 4; nearest: .*pp2"),
    (
        "_pipeline_batches",
        case("pp2.v2", 2, batch=5),
        "2 rounds, and 5 micro-batches.*global_batch 4",
    ),
    ("_pipeline_batches", case("pp2.dualpipev", 2, batch=3), "at least 4.*global_batch 4"),
    (
        "_compile_split",
        case("pp2.zbv", 2, compiled=True),
        "compile=false, or nearest: .*interleaved",
    ),
    ("_fp8_precision", fp8_case(precision="fp16"), "fp16 scales its loss.*use bf16"),
    ("_fp8_compile", fp8_case(compiled=True), "engine.compile: true.*use false or auto"),
    ("_fp8_modules", fp8_case(first_layers=3), "first_layers: 3 and last_layers 1 leave none"),
    ("_fp8_modules", fp8_case(modules=["layers.*.ffn.*"]), "modules: no linear.*mlp"),
    ("_fp8_widths", fp8_case(recipe="block"), "block needs output features.*128.*nearest: 128"),
    ("_fp8_widths", fp8_case("tp4", 4), "multiples of 16, and .* has 8 a rank of tp4.*smaller tp"),
    ("_fp8_widths", fp8_case("tp2", 2, recipe="mxfp8"), "has 16 a rank of tp2.*nearest: 32"),
    ("_fp8_domains", fp8_case("dp2", 2, domains="tp2"), "emulated on one rank, and .* has 2"),
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
    seen = [
        (a.computation_type.value, a.stage_index, a.microbatch_index)
        for actions in program(layout, num_microbatches)
        for a in actions
    ]
    assert len(seen) == len(set(seen))
    for part in range(layout.num_chunks):
        for m in range(num_microbatches):
            assert ("F", part, m) in seen
            assert ("B", part, m) in seen or {("I", part, m), ("W", part, m)} <= set(seen)
    assert {kind for kind, _, _ in seen} <= {
        "F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B",
    }  # fmt: skip
