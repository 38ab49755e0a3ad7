"""The layout grammar and its refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.parallel.layout import SCHEDULES, SINGLE, V_SHAPED, Layout, parse_layout

sizes = st.integers(1, 4)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    shard, copies, tp, pp, cp = (draw(sizes) for _ in range(5))
    zero = draw(st.integers(0, 3))
    schedule = draw(st.sampled_from(SCHEDULES)) if pp > 1 else "1f1b"
    loop = schedule in ("interleaved", "interleavedzb")
    virtual = draw(st.integers(2, 3)) if loop else 2 if schedule in V_SHAPED and pp > 1 else 1
    return Layout(
        dp=shard * copies,
        shard=shard if zero else 1,
        zero=zero,
        tp=tp,
        sp=tp > 1 and draw(st.booleans()),
        pp=pp,
        virtual=virtual,
        schedule=schedule,
        cp=cp,
        cp_kind=draw(st.sampled_from(["ring", "ulysses"])) if cp > 1 else "ring",
    )


@given(layouts(), st.randoms())
def test_round_trip_in_any_order(layout: Layout, random: st.DataObject) -> None:
    tokens = str(layout).split(".")
    random.shuffle(tokens)  # type: ignore[attr-defined]
    assert parse_layout(".".join(tokens), layout.world) == layout


def test_defaults() -> None:
    assert parse_layout("auto", 4) == Layout(4, 4, 1)
    assert parse_layout("zero3", 2) == Layout(2, 2, 3)
    assert parse_layout("dp2.zero0", 2) == Layout(2, 1, 0)
    assert parse_layout("tp2.sp", 8) == Layout(4, 4, 1, tp=2, sp=True)
    assert parse_layout("pp2", 2) == Layout(pp=2, schedule="1f1b")
    assert parse_layout("pp2.v3", 2) == Layout(pp=2, virtual=3, schedule="interleaved")
    assert parse_layout("pp2.zbv", 2) == Layout(pp=2, virtual=2, schedule="zbv")
    assert parse_layout("cp2", 2).cp_kind == "ring"
    assert set(SINGLE) | set(V_SHAPED) < set(SCHEDULES)


@pytest.mark.parametrize(
    "text,world,words",
    [
        ("dp3", 2, "--nproc 3"),
        ("dp2.tp2", 6, "needs 4 ranks but 6"),
        ("dp4.hsdp3", 4, "hsdp4|hsdp2"),
        ("dp2.foo", 2, "known: dpN"),
        ("dp2.dp2", 2, "twice"),
        ("pp2.zbv.1f1b", 2, "a schedule appears twice"),
        ("cp2.ring.ulysses", 2, "ring or ulysses appears twice"),
        ("dp2.zero4", 2, "0 to 3"),
        ("dp4.hsdp2.zero0", 4, "drop hsdp2"),
        ("", 1, "not a layout token"),
        ("dp0", 1, "at least dp1"),
        ("sp", 1, "needs tpN"),
        ("dp2.ulysses", 2, "needs cpN"),
        ("dp2.zbv", 2, "needs ppN"),
        ("pp2.1f1b.v2", 2, "one model chunk"),
        ("pp2.zbv.v3", 2, "two model chunks"),
        ("pp2.interleaved.v1", 2, "needs v2"),
        ("dp2.ep2", 2, "no model has experts"),
    ],
)
def test_refused_with_a_mend(text: str, world: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_layout(text, world)
