"""NF4 with double quantisation: bit by bit bitsandbytes', and cut anywhere without a change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import bitsandbytes, nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 130))


def weights(shape: tuple[int, int], dtype: torch.dtype, seed: int, zeros: bool = False) -> Tensor:
    """Normal numbers of some magnitude; ``zeros``: about half of the blocks hold nothing else."""
    g = torch.Generator().manual_seed(seed)
    magnitude = 10.0 ** (6.0 * torch.rand((), generator=g) - 5.0)
    flat = torch.randn(shape, generator=g).flatten() * magnitude
    for start in range(0, len(flat) if zeros else 0, 2 * nf4.BLOCK):
        flat[start : start + nf4.BLOCK] = 0.0
    return flat.view(shape).to(dtype)


def whole(shape: tuple[int, int]) -> nf4.Runs:
    return nf4.Runs.of(shape, range(shape[0]), range(shape[1]))


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes, "unusable", lambda *_: "left out by a test")


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """The library compiles its own fallback for odd sizes, once a shape."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@settings(max_examples=60)
@given(SIZES, st.sampled_from(DTYPES), st.integers(0, 1000), st.booleans())
@example((3, 64), torch.float32, 0, True)  # the last block is zero
@example((1, 1), torch.bfloat16, 0, False)
@example((4, 32), torch.float32, 1, True)  # every absmax is the mean: a nested block of zeros
@example((300, 64), torch.float16, 2, False)  # two nested blocks, the second ragged
@pytest.mark.usefixtures("eager")
def test_bits_are_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, seed: int, zeros: bool
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = weights(shape, dtype, seed, zeros)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    ours = nf4.quantise(weight)
    size = -(-weight.numel() // 2)
    assert torch.equal(ours.codes_NC.flatten()[:size], codes.flatten())
    assert torch.equal(ours.absmax_N, state.absmax)
    assert torch.equal(ours.nested_M, state.state2.absmax) and ours.offset == state.offset
    if shape[1] % nf4.BLOCK:
        # Its AVX-512 part (0.50.2) takes other blocks' scales where rows are not whole blocks; odd
        # rows are computed by its general one. We ask it for rows of one block each.
        state.shape = torch.Size([weight.numel(), 1])
    expected = functional.dequantize_4bit(codes, state).view(shape)
    with pytest.MonkeyPatch.context() as patch:
        assert torch.equal(ours.dequantise(whole(shape), dtype).view(shape), expected)
        without_library(patch)
        assert torch.equal(ours.dequantise(whole(shape), dtype).view(shape), expected)


@given(SIZES, st.integers(0, 1000), st.data())
@settings(max_examples=40)
def test_a_part_has_the_numbers_of_the_whole(
    shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    weight = weights(shape, torch.float32, seed)
    quantised = nf4.quantise(weight)
    full = quantised.dequantise(whole(shape), torch.float32).view(shape)
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    c, d = sorted(data.draw(st.tuples(*[st.integers(0, shape[1])] * 2)))
    runs = nf4.Runs.of(shape, range(a, b), range(c, d))
    part = quantised.part(runs)
    assert len(part.codes_NC) == runs.num * runs.num_blocks
    found = part.dequantise(runs, torch.float32)
    assert torch.equal(found.reshape(b - a, d - c), full[a:b, c:d])


def test_it_is_near_and_small() -> None:
    """Half the widest gap between codes, times the absmax and what a byte loses of that."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    quantised = nf4.quantise(weight)
    found = quantised.dequantise(whole((96, 256)), torch.float32).view(96, 256)
    codes = torch.tensor(nf4.NF4)
    gap = (codes[1:] - codes[:-1]).max() / 2
    absmax = weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert ((found - weight).view(-1, 64).abs() <= absmax * (gap + 0.02)).all()
    assert float((found - weight).square().mean() / weight.square().mean()) < 0.01
    held = sum(t.nbytes for t in vars(quantised).values())
    assert held == nf4.num_bytes(whole((96, 256)), weight.numel())
    assert held / weight.numel() < 0.52
