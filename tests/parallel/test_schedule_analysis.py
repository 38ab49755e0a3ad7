"""What all ranks' programs say together, against the programs themselves carried out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.parallel import schedule_analysis
from shardwise.parallel.layout import SCHEDULES, SINGLE, V_SHAPED, Layout
from shardwise.parallel.memory_inputs import place_of
from shardwise.parallel.pipeline import forward_program, homes, program
from tests.support import toy

MODEL = toy.llama(num_layers=12)


def layout_of(schedule: str, pp: int, virtual: int = 2) -> Layout:
    virtual = 1 if schedule in SINGLE else 2 if schedule in V_SHAPED else virtual
    return Layout(pp=pp, virtual=virtual, schedule=schedule)


layouts = st.builds(layout_of, st.sampled_from(SCHEDULES), st.integers(2, 4), st.integers(2, 3))


def receipt(message: tuple[str, int, int]) -> tuple[str, int, int]:
    """The action that makes room for a message; a send is over only when it has happened."""
    kind, chunk, microbatch = message
    ahead = kind == "SEND_F"
    return "RECV_F" if ahead else "RECV_B", chunk + (1 if ahead else -1), microbatch


def executed(programs: schedule_analysis.Programs) -> Iterator[tuple[int, int]]:
    """Ranks that run ahead as far as they can, rank 0 the furthest; stops where all wait."""
    waits, keys = programs.releases, programs.actions
    arriving = {k for row in keys for k in row if k[0].startswith("RECV")}
    done: set[tuple[str, int, int]] = set()
    at = [0] * len(keys)
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(keys):
            while at[rank] < len(row):
                kind, chunk, m = row[at[rank]]
                needed = [receipt(message) for message in waits[rank].get(at[rank], ())]
                here = ("RECV_F" if kind == "F" else "RECV_B", chunk, m)
                if kind in ("F", "B", "I") and here in arriving:
                    sender = ("SEND_F", chunk - 1, m) if kind == "F" else ("SEND_B", chunk + 1, m)
                    needed += [here, sender]
                if not done.issuperset(needed):
                    break
                done.add(row[at[rank]])
                yield rank, at[rank]
                at[rank] += 1
                progress = True


@given(layouts, st.integers(1, 4), st.booleans())
def test_waiting_for_messages_never_stops_the_ranks(
    layout: Layout, rounds: int, forward_only: bool
) -> None:
    number = 2 * rounds * layout.pp
    programs = (forward_program if forward_only else program)(layout, number)
    assert sum(1 for _ in executed(programs)) == sum(map(len, programs.actions))
    for rank, actions in enumerate(programs.actions):
        sends = [a for a in actions if a[0].startswith("SEND")]
        for index, named in programs.releases[rank].items():
            before = set(actions[:index])
            assert before.issuperset(named)
            sends = [s for s in sends if s not in named]
        # What is left at the end does not grow with the number of micro-batches.
        assert len(sends) <= 4 * layout.num_chunks


@given(layouts, st.integers(1, 3))
def test_activations_are_held_from_forward_to_backward(layout: Layout, rounds: int) -> None:
    number = 2 * rounds * layout.pp
    for rank, actions in enumerate(program(layout, number).actions):
        size = dict.fromkeys(range(layout.num_chunks), 1)
        found, together = schedule_analysis.in_flight(actions, size)
        every = [{"F": 1, "B": -1, "W": -1}.get(kind, 0) for kind, _, _ in actions]
        assert sum(together.values()) == max(itertools.accumulate(every))
        assert all(n <= found[chunk] for chunk, n in together.items())
        for chunk, most in found.items():
            held = [
                {"F": 1, "B": -1, "W": -1}.get(kind, 0) * (c == chunk) for kind, c, _ in actions
            ]
            assert most == max(itertools.accumulate(held)) and sum(held) == 0
        place = place_of(MODEL, layout, rank, number)
        assert [p.in_flight for p in place.parts] == [
            found[c] for c, home in sorted(homes(layout).items()) if home == rank
        ]


@given(layouts, st.integers(1, 3))
def test_halves_of_split_backward_passes(layout: Layout, rounds: int) -> None:
    number = 2 * rounds * layout.pp
    for rank, actions in enumerate(program(layout, number).actions):
        chunks = sorted(c for c, home in homes(layout).items() if home == rank)
        every = list(actions)
        expected = set()
        for i in range(len(every) + 1):
            half = [k[1] for k in every[:i] if k[0] == "I"]
            whole = [k[1] for k in every[:i] if k[0] == "W"]
            expected.add(tuple(half.count(c) - whole.count(c) for c in chunks))
        assert set(place_of(MODEL, layout, rank, number).halves) == expected


def test_one_chunk_a_rank_by_hand() -> None:
    """1F1B: as many as ranks to the end, never more than there are. Narayanan 2021, figure 4."""

    def held(schedule: str, number: int) -> list[int]:
        programs = program(layout_of(schedule, 4), number)
        return [schedule_analysis.in_flight(programs.actions[r], {r: 1})[0][r] for r in range(4)]

    assert held("1f1b", 8) == [4, 3, 2, 1]
    assert held("1f1b", 2) == [2, 2, 2, 1]
    assert held("gpipe", 8) == [8] * 4


def test_many_chunks_hold_more_than_1f1b() -> None:
    for schedule in ("interleaved", "interleavedzb", "zbv", "dualpipev"):
        place = place_of(MODEL, layout_of(schedule, 4), 0, 16)
        assert sum(p.in_flight for p in place.parts) > 4, schedule


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "gpipe"])
def test_messages_do_not_add_up_with_micro_batches(schedule: str) -> None:
    layout = layout_of(schedule, 4)
    few, many = ([most for most, _ in program(layout, n).messages] for n in (32, 64))
    assert few == many and max(few) < 32


def test_a_number_that_a_schedule_cannot_do_counts_as_the_next() -> None:
    layout = layout_of("dualpipev", 2)
    assert place_of(MODEL, layout, 0, 1) == place_of(MODEL, layout, 0, 4)
