"""Region arithmetic against brute force over element indices."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.ops.regions import (
    Region,
    chunk,
    contains,
    first_clash,
    full_region,
    overlap,
    product,
    strided_chunk,
    tiling_problem,
)


def elements(region: Region) -> set[tuple[int, ...]]:
    return set(
        itertools.product(
            *(range(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))
        )
    )


@st.composite
def region_lists(draw: st.DrawFn, most: int = 5) -> list[Region]:
    num_dims = draw(st.integers(0, 3))
    side = st.tuples(st.integers(0, 4), st.integers(0, 4))
    sides = st.lists(side, min_size=num_dims, max_size=num_dims)
    drawn = draw(st.lists(sides, min_size=2, max_size=most))
    return [Region(tuple(o for o, _ in s), tuple(n for _, n in s)) for s in drawn]


@given(region_lists())
def test_overlap_and_containment_are_those_of_the_element_sets(regions: list[Region]) -> None:
    a, b = regions[:2]
    common = overlap(a, b)
    assert (elements(common) if common else set()) == elements(a) & elements(b)
    if b.volume:
        assert contains(a, b) == (elements(b) <= elements(a))


@given(region_lists())
def test_a_clash_is_found_exactly_when_an_element_is_held_twice(regions: list[Region]) -> None:
    filled = [b for b in regions if b.volume]
    twice = any(elements(a) & elements(b) for a, b in itertools.combinations(filled, 2))
    found = first_clash(filled)
    assert (found is not None) == twice
    if found:
        assert elements(found[0]) & elements(found[1])


@given(st.lists(st.integers(1, 5), max_size=3), st.data())
def test_cutting_a_tensor_tiles_it_and_dropping_a_box_is_noticed(
    shape: list[int], data: st.DataObject
) -> None:
    cuts = []
    for n in shape:
        inner = sorted(data.draw(st.sets(st.integers(1, n - 1)))) if n > 1 else []
        cuts.append(list(zip([0, *inner], [*inner, n])))
    regions = [
        Region(tuple(a for a, _ in c), tuple(b - a for a, b in c)) for c in itertools.product(*cuts)
    ]
    assert tiling_problem(shape, regions) is None
    gone = data.draw(st.integers(0, len(regions) - 1))
    rest = regions[:gone] + regions[gone + 1 :]
    assert "held by nobody" in (tiling_problem(shape, rest) or "")
    assert tiling_problem(shape, [*regions, regions[gone]]) is not None


def test_a_box_outside_of_the_tensor_is_named() -> None:
    assert "sticks out" in (tiling_problem([4], [Region((2,), (3,))]) or "")


@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 4))
def test_chunks_are_those_of_torch(size: int, count: int, factor: int) -> None:
    index = torch.arange(size)

    def padded(tensor: torch.Tensor, parts: int) -> list[torch.Tensor]:
        chunks = list(tensor.chunk(parts)) if len(tensor) else []
        return chunks + [tensor[:0]] * (parts - len(chunks))

    start = [(0, size)] if size else []
    for part in range(count):
        held = [i for a, b in chunk(start, count, part) for i in range(a, b)]
        assert held == padded(index, count)[part].tolist()
        held = [i for a, b in strided_chunk(start, count, part, factor) for i in range(a, b)]
        assert held == [i for p in padded(index, factor) for i in padded(p, count)[part].tolist()]


def test_a_product_maps_global_boxes_to_the_packed_local_tensor() -> None:
    tensor = torch.arange(30).reshape(5, 6)
    rows, columns = [(0, 1), (3, 5)], [(2, 4)]
    local = tensor[[0, 3, 4]][:, [2, 3]]
    for region, inner in product([rows, columns]):
        expected = tensor[region.relative_to((0, 0))]
        assert torch.equal(local[inner.relative_to((0, 0))], expected)
    assert product([]) == [(full_region(()), full_region(()))]
    assert product([[], columns]) == []
