"""Keys and draws: uniform, independent of layout, stable for ever."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.ops import rng

INT64 = st.integers(-(2**63), 2**63 - 1)
WORD = (1 << 64) - 1


def _reference_mix(x: int) -> int:
    """SplitMix64's finaliser in unbounded integers, as printed in the paper."""
    x &= WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


@given(INT64)
def test_mix_is_the_published_finaliser(x: int) -> None:
    assert int(rng.mix(torch.tensor(x))) & WORD == _reference_mix(x)


@given(INT64, st.integers(0, 2**40), st.integers(0, 2**40))
def test_fold_orders_and_separates(key: int, a: int, b: int) -> None:
    k = torch.tensor(key)
    assert int(rng.fold(k, a)) == int(rng.fold(k, torch.tensor(a)))
    if a != b:
        assert int(rng.fold(k, a)) != int(rng.fold(k, b))
        assert int(rng.fold(rng.fold(k, a), b)) != int(rng.fold(rng.fold(k, b), a))


def test_key_is_stable_and_tells_parts_apart() -> None:
    assert rng.key(0, "init", 3) == 757837668734800805
    keys = [
        rng.key(0, "ab", "c"),
        rng.key(0, "a", "bc"),
        rng.key(0, "abc"),
        rng.key(0, 1),
        rng.key(0, "1"),
        rng.key(1, "abc"),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_open_and_flat(dtype: torch.dtype) -> None:
    keys = rng.fold(torch.tensor(rng.key(7, "uniform")), torch.arange(200_000))
    u = rng.uniform(keys, dtype)
    assert u.dtype == dtype and float(u.min()) > 0 and float(u.max()) < 1
    # Chi-square over 100 bins: mean 99, standard deviation 14.1; 170 is 5 sigma.
    counts = torch.histc(u.float(), 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 170
    assert abs(float(torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1])) < 0.012


def test_uniform_never_reaches_its_ends() -> None:
    """The largest and the smallest bit patterns still lie inside (0, 1), in fp32 too."""
    for num_bits, dtype in ((23, torch.float32), (52, torch.float64)):
        top = torch.tensor((1 << num_bits) - 1).to(dtype)
        assert float((top * 0 + 0.5) * 2.0**-num_bits) > 0.0
        assert float((top + 0.5) * 2.0**-num_bits) < 1.0


def test_token_keys_does_not_depend_on_how_the_batch_is_cut() -> None:
    samples, positions = torch.tensor([11, 3, 900]), torch.arange(16)
    whole = rng.token_keys(5, 2, "sft", samples, positions)
    rows = torch.cat([rng.token_keys(5, 2, "sft", s[None], positions) for s in samples])
    columns = torch.cat(
        [rng.token_keys(5, 2, "sft", samples, p) for p in positions.split(4)], dim=1
    )
    assert torch.equal(whole, rows) and torch.equal(whole, columns)
    assert whole.unique().numel() == whole.numel()
    for other in (
        rng.token_keys(6, 2, "sft", samples, positions),
        rng.token_keys(5, 3, "sft", samples, positions),
        rng.token_keys(5, 2, "pretrain", samples, positions),
    ):
        assert not (whole == other).any()
