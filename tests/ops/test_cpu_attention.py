"""The CPU kernel of attention: against written-out math in fp64, whatever is visible."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import attention_blocks, compiled, cpu_attention
from shardwise.ops.attention import Mask, attention
from shardwise.ops.attention_blocks import Block

pytestmark = pytest.mark.skipif(not cpu_attention.available(), reason="no C++ compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _case(
    seed: int, queries: int, keys: int, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v and a gradient; heads in front, not in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, queries, heads[0], width), *[(2, keys, heads[1], width)] * 2]
    shapes.append(shapes[0])
    return [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def _by_hand(tensors: list[Tensor], allowed: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and three gradients, by the explicit pair in fp64."""
    q, k, v, grad = (x.double() for x in tensors)
    block = Block(slice(None), slice(None), allowed)
    out, lse = attention_blocks._explicit_forward(q, k, v, block)
    grads = attention_blocks._explicit_backward(grad, q, k, v, out, lse, block)
    return [out, lse, *grads]


def _assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        blind = y == -math.inf
        assert torch.equal(x == -math.inf, blind), name
        y = y.masked_fill(blind, 0.0)
        error = (x.double().masked_fill(blind, 0.0) - y).abs().max()
        allowed = 1e-5 if x.dtype == torch.float32 else tolerance  # lse: products of bf16 are exact
        assert error <= allowed * max(1.0, float(y.abs().max())), (name, float(error))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 1000),
    st.integers(16, 70),
    st.integers(1, 70),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.sampled_from([16, 32, 48, 80]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["causal", "all", "some", "blocks"]),
)
def test_equals_math(
    seed: int,
    queries: int,
    keys: int,
    heads: tuple[int, int],
    width: int,
    dtype: torch.dtype,
    kind: str,
) -> None:
    if kind == "causal":
        keys = queries
    tensors = _case(seed, queries, keys, heads, width, dtype)
    index_T, index_S = torch.arange(queries)[:, None], torch.arange(keys)
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if kind == "causal":
        allowed = (index_T >= index_S)[None, None]
    elif kind == "some":  # some queries see nothing
        generator = torch.Generator().manual_seed(seed)
        allowed = torch.rand(2, 1, queries, keys, generator=generator) < 0.1
    elif kind == "blocks":  # whole panels are skipped
        allowed = (index_T // 17 == index_S // 17)[None, None]
    mask = None if kind in ("causal", "all") else allowed
    q, k, v, grad = tensors
    out, lse = cpu_attention.attend(q, k, v, mask, kind == "causal")
    grads = cpu_attention.attend_backward(grad, q, k, v, out, lse, mask, kind == "causal")
    _assert_close([out, lse, *grads], _by_hand(tensors, allowed), TOLERANCE[dtype])


def test_gradients_of_blocks_add_up() -> None:
    """Given the merged output and log-sum-exp, each half of the keys gives its part."""
    q, k, v, grad = tensors = _case(0, 40, 64, (4, 2), 16, torch.float32)
    whole = torch.ones(1, 1, 40, 64, dtype=torch.bool)
    whole[..., :7, :32] = False  # of the first half, these queries see nothing
    out, lse = torch.zeros(2, 4, 40, 16), torch.full((2, 4, 40), -math.inf)
    halves = [(slice(a, a + 32), whole[..., a : a + 32]) for a in (0, 32)]
    for keys, allowed in halves:
        part = cpu_attention.attend(q, k[:, :, keys], v[:, :, keys], allowed, False)
        attention_blocks.merge(out, lse, *part)
    parts = [
        cpu_attention.attend_backward(
            grad, q, k[:, :, keys], v[:, :, keys], out, lse, allowed, False
        )
        for keys, allowed in halves
    ]
    dk, dv = (torch.cat([p[i] for p in parts], dim=2) for i in (1, 2))
    found = [out, lse, parts[0][0] + parts[1][0], dk, dv]
    _assert_close(found, _by_hand(tensors, whole), 1e-5)


@pytest.mark.parametrize("compile", [False, True])
def test_the_operator_is_a_good_citizen(compile: bool) -> None:
    """Autograd, shapes and strides without data, and compiled graphs agree with the kernel."""
    q, k, v, grad = _case(1, 32, 32, (4, 2), 16, torch.float32)
    if not compile:
        inputs = [x.requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(cpu_attention.attend, (*inputs, None, True))
        return
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    run = torch.compile(attention, fullgraph=True)
    out = run(*leaves, Mask())
    out.backward(grad)
    expected = _by_hand([q, k, v, grad], torch.ones(32, 32, dtype=torch.bool).tril()[None, None])
    found = [out.detach(), *[x.grad for x in leaves if x.grad is not None]]
    _assert_close([found[0], expected[1], *found[1:]], expected, 1e-5)


def test_any_number_of_threads_computes_the_same_bits() -> None:
    q, k, v, grad = _case(2, 50, 50, (4, 2), 32, torch.bfloat16)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, lse = cpu_attention.attend(q, k, v, None, True)
            found.append((out, *cpu_attention.attend_backward(grad, q, k, v, out, lse, None, True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_it_does_not_serve_goes_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = _case(3, 16, 16, (2, 2), 16, torch.float32)
    assert cpu_attention.serves(q)
    expected = attention(q, k, v, Mask())
    for other in (q.double(), q[:, :, :15], q[..., :8], q.to("meta")):
        assert not cpu_attention.serves(other)

    def broken() -> None:
        raise compiled.CannotBuildError("no compiler")

    monkeypatch.setattr(cpu_attention, "library", broken)
    assert not cpu_attention.serves(q)
    assert (attention(q, k, v, Mask()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("place", range(3))
def test_what_is_not_a_number_is_not_lost(place: int) -> None:
    tensors = _case(5, 40, 40, (2, 2), 16, torch.float32)
    tensors[place][0, 0, 3, 5] = torch.nan
    out, _ = cpu_attention.attend(*tensors[:3], None, True)
    assert bool(out[0, 0, 3].isnan().any()) and bool(out[0, 1].isfinite().all())


def test_a_mask_of_another_size_is_refused() -> None:
    q, k, v, _ = _case(4, 16, 16, (2, 2), 16, torch.float32)
    with pytest.raises(ValueError, match=r"mask .* \(1, 1, 16, 15\)"):
        cpu_attention.attend(q, k, v, torch.ones(1, 1, 16, 15, dtype=torch.bool), False)
