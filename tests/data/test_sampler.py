"""The sampler: every split of the stream into steps and ranks consumes the same samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.data.sampler import _SORTED_BELOW, Permutation, Sampler, stream_key
from shardwise.errors import UserError

# Both ways to shuffle: by sorting (small), by a Feistel network.
SIZES = st.one_of(st.integers(1, 60), st.integers(_SORTED_BELOW + 1, _SORTED_BELOW + 3000))
SEEDS = st.integers(0, 2**40)


@given(SIZES, SEEDS)
def test_each_epoch_is_a_permutation(n: int, seed: int) -> None:
    sampler = Sampler(n, seed, "s")
    for epoch in range(3):
        assert sorted(sampler.batch(epoch * n, n)) == list(range(n))


@given(
    SIZES,
    SEEDS,
    st.integers(0, 20_000),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=12),
)
def test_any_split_consumes_what_one_process_does(
    n: int, seed: int, start: int, steps: list[tuple[int, int]]
) -> None:
    """Steps of any batch size, each on any number of ranks, resumed from any position."""
    sampler = Sampler(n, seed)
    consumed: list[int] = []
    position = start
    for size, world in steps:
        batch = Sampler(n, seed).batch(position, size)  # a fresh object: there is no hidden state
        for part in np.array_split(batch, world):
            consumed.extend(part)
        position += size
    assert consumed == sampler.batch(start, position - start).tolist()


@given(SIZES, SEEDS)
def test_any_order_of_positions(n: int, seed: int) -> None:
    sampler = Sampler(n, seed)
    positions = np.arange(2 * n)
    mixed = np.random.default_rng(0).permutation(positions)
    np.testing.assert_array_equal(sampler.at(mixed), sampler.at(positions)[mixed])


def test_seed_name_and_epoch_change_the_order() -> None:
    n = 100
    orders = [
        Sampler(n, 0, "a").batch(0, n),
        Sampler(n, 1, "a").batch(0, n),
        Sampler(n, 0, "b").batch(0, n),
        Sampler(n, 0, "a").batch(n, n),
    ]
    for a, b in itertools.combinations(orders, 2):
        assert (a != b).mean() > 0.9


def test_order_is_frozen() -> None:
    """The order is part of the file format, so to say: a resume on a newer version relies on it."""
    assert stream_key(7, "train", "epoch", 0) == 7496088367305076602
    assert Sampler(8, 7, "train").batch(0, 8).tolist() == [3, 1, 6, 7, 5, 0, 4, 2]
    large = Sampler(10**6, 7, "train").batch(0, 4).tolist()
    assert large == [682024, 837015, 909911, 287890]


def test_large_epochs_cost_no_memory() -> None:
    n = 10**12
    drawn = Sampler(n, 3).batch(5 * n - 500, 1000)  # across the edge of two epochs
    assert len(set(drawn[:500].tolist())) == len(set(drawn[500:].tolist())) == 500
    assert drawn.min() >= 0 and drawn.max() < n
    assert 0.4 < drawn.mean() / n < 0.6


@pytest.mark.parametrize("n", [3, 8, _SORTED_BELOW + 8])
def test_shuffle_is_uniform(n: int) -> None:
    """Where 8 cells of indices go, over keys: chi-square, in 8x8 cells, against its quantile."""
    trials, cells = 600, min(n, 8)
    counts = np.zeros((cells, cells))
    index = np.arange(n)[:: max(n // 64, 1)]
    for key in range(trials):
        image = Permutation(n, stream_key(key, "u"))(index)
        np.add.at(counts, (index * cells // n, image * cells // n), 1)
    expected = counts.sum(axis=1, keepdims=True) / cells
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = cells * (cells - 1)
    assert chi2 < degrees + 5 * np.sqrt(2 * degrees)


def test_neighbours_are_torn_apart() -> None:
    n = _SORTED_BELOW * 2 - 1
    order = Sampler(n, 0).batch(0, n).astype(float)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n)


def test_unshuffled() -> None:
    assert Sampler(3, 0, shuffle=False).batch(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_refusals() -> None:
    with pytest.raises(UserError, match="no samples"):
        Sampler(0, 0)
