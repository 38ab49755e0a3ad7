"""Attention: every path against written-out math, and packing against separate documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import flash, rng
from shardwise.ops.attention import Mask, allowed_by_position, attention, causal_mask
from tests.contracts.signatures import checked, versions


def _qkv(
    num_rows: int, heads: int, groups: int, num_tokens: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    q = torch.randn(num_rows, heads, num_tokens, 8, dtype=dtype)
    k, v = torch.randn(2, num_rows, groups, num_tokens, 8, dtype=dtype)
    return q, k, v


def _by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """One query at a time, over the keys that it may see."""
    out = torch.zeros_like(q)
    repeats = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = allowed[b if allowed.shape[0] > 1 else 0, 0, t].nonzero().flatten()
                keys, values = k[b, h // repeats, seen], v[b, h // repeats, seen]
                weights = torch.softmax(keys @ q[b, h, t] / q.shape[-1] ** 0.5, 0)
                out[b, h, t] = weights @ values
    return out


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 9),
    st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    st.sampled_from([None, 1, 3, 20]),
    st.booleans(),
    st.data(),
)
def test_equals_math(
    num_tokens: int, heads: tuple[int, int], window: int | None, packed: bool, data: Any
) -> None:
    q, k, v = _qkv(2, *heads, num_tokens)
    segments = None
    if packed:
        steps = data.draw(st.lists(st.integers(0, 1), min_size=num_tokens, max_size=num_tokens))
        segments = torch.tensor([steps, steps[::-1]]).cumsum(1)
    allowed = torch.zeros(2, 1, num_tokens, num_tokens, dtype=torch.bool)
    for b in range(2):
        for i in range(num_tokens):
            for j in range(i + 1):
                near = window is None or i - j < window
                same = segments is None or bool(segments[b, i] == segments[b, j])
                allowed[b, 0, i, j] = near and same
    positions = torch.arange(num_tokens).expand(2, -1)
    mask = causal_mask(positions, q.dtype, segments, window)
    torch.testing.assert_close(
        attention(q, k, v, mask), _by_hand(q, k, v, allowed), atol=1e-12, rtol=1e-12
    )


def test_plain_causal_builds_no_mask() -> None:
    assert causal_mask(torch.arange(8).expand(2, -1), torch.float32) == Mask()
    assert causal_mask(torch.arange(8).expand(2, -1), torch.float32, window=8) == Mask()


def test_queries_behind_cached_keys() -> None:
    """The last 3 queries of 7 over all 7 keys give the last 3 outputs."""
    q, k, v = _qkv(2, 4, 2, 7)
    whole = attention(q, k, v, Mask())
    allowed = allowed_by_position(torch.arange(4, 7).expand(2, 3), torch.arange(7))
    part = attention(q[:, :, 4:], k, v, Mask(allowed_B1TS=allowed))
    torch.testing.assert_close(part, whole[:, :, 4:], atol=1e-12, rtol=0)


def test_packed_gradients_equal_separate_documents() -> None:
    q, k, v = (t.requires_grad_() for t in _qkv(1, 4, 2, 9))
    segments = torch.tensor([[0] * 4 + [1] * 5])
    mask = causal_mask(torch.arange(9)[None], q.dtype, segments)
    attention(q, k, v, mask).square().sum().backward()
    packed = [t.grad for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    for part in (slice(0, 4), slice(4, 9)):
        attention(*(t[:, :, part] for t in (q, k, v)), Mask()).square().sum().backward()
    for got, t in zip(packed, (q, k, v)):
        assert got is not None and t.grad is not None
        torch.testing.assert_close(got, t.grad, atol=1e-12, rtol=0)


def test_dropout_path_without_drops_is_attention() -> None:
    """With a probability too small to drop anything, the explicit path is the fused one."""
    q, k, v = _qkv(2, 4, 2, 6)
    keys = rng.token_keys(0, 0, "t", torch.arange(2), torch.arange(6))
    for mask in (Mask(), causal_mask(torch.arange(6).expand(2, -1), q.dtype, window=2)):
        got = attention(q, k, v, mask, dropout_p=1e-12, rng_keys_BT=keys)
        torch.testing.assert_close(got, attention(q, k, v, mask), atol=1e-12, rtol=1e-12)


def test_dropout_of_a_slice_of_heads_and_rows() -> None:
    q, k, v = _qkv(3, 4, 4, 6)
    keys = rng.token_keys(0, 0, "t", torch.arange(3), torch.arange(6))
    whole = attention(q, k, v, Mask(), dropout_p=0.5, rng_keys_BT=keys)
    part = attention(
        *(t[1:2, 2:] for t in (q, k, v)),
        Mask(),
        dropout_p=0.5,
        rng_keys_BT=keys[1:2],
        head_offset=2,
    )
    assert torch.equal(part, whole[1:2, 2:])
    assert not torch.allclose(whole, attention(q, k, v, Mask()))


class _FlashStandIn:
    """flash-attn's two functions, behind a release's signatures, computed by plain math."""

    def __init__(self, version: str) -> None:
        self.calls: list[str] = []
        for name, compute in (
            ("flash_attn_func", self.dense),
            ("flash_attn_varlen_func", self.varlen),
        ):
            setattr(self, name, checked("flash_attn", f"flash_attn.{name}", version, compute))

    def dense(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        window_size: tuple[int, int],
        **unused: Any,
    ) -> Tensor:
        assert causal and not any(unused.values()), unused
        self.calls.append("dense")
        window = None if window_size == (-1, -1) else window_size[0] + 1
        index = torch.arange(q.shape[1])
        allowed = allowed_by_position(index[None], index, window)
        return _by_hand(*(t.transpose(1, 2) for t in (q, k, v)), allowed).transpose(1, 2)

    def varlen(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **rest: Any,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k
        assert int(cu_seqlens_q[0]) == 0 and int(cu_seqlens_q[-1]) == q.shape[0]
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
        parts = []
        for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist()):
            document = {n: t[None, begin:end] for n, t in (("q", q), ("k", k), ("v", v))}
            parts.append(self.dense(**document, **rest)[0])
        self.calls[:] = ["varlen"]
        return torch.cat(parts)


@pytest.mark.parametrize("version", versions("flash_attn"))
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_is_called_rightly(
    monkeypatch: pytest.MonkeyPatch, window: int | None, packed: bool, version: str
) -> None:
    q, k, v = _qkv(2, 4, 2, 7)
    segments = torch.tensor([[5, 5, 5, 6, 6, 6, 6], [6, 7, 7, 7, 7, 8, 8]]) if packed else None
    positions = torch.arange(7).expand(2, -1)
    plain = causal_mask(positions, q.dtype, segments, window)
    expected = attention(q, k, v, plain)
    keys = rng.token_keys(0, 0, "t", torch.arange(2), torch.arange(7))
    dropped = attention(q, k, v, plain, dropout_p=0.3, rng_keys_BT=keys)
    library = _FlashStandIn(version)
    monkeypatch.setattr(flash, "unusable", lambda device, dtype: None)
    monkeypatch.setattr(flash, "_library", lambda: (library, ""))
    mask = causal_mask(positions, q.dtype, segments, window)
    got = attention(q, k, v, mask)
    assert library.calls == ["varlen" if packed else "dense"]
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    # The same mask, in its short form, still serves the explicit path.
    again = attention(q, k, v, mask, dropout_p=0.3, rng_keys_BT=keys)
    torch.testing.assert_close(again, dropped, atol=1e-12, rtol=0)


def test_flash_attn_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert "CUDA only" in str(flash.unusable(torch.device("cpu"), torch.bfloat16))
    assert "float32" in str(flash.unusable(gpu, torch.float32))
    assert "up to 256 wide, and these have 264" in str(flash.unusable(gpu, torch.bfloat16, 264))
    monkeypatch.setattr(flash, "_library", lambda: (object(), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or more; this one has 7.5" in str(flash.unusable(gpu, torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert flash.unusable(gpu, torch.bfloat16, 256) is None


def test_heads_too_wide_for_flash_attn_are_computed_without_it() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 6, 264, generator=g) for _ in range(3))
    segments = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 3]])
    starts = torch.tensor([0, 2, 6, 10, 12], dtype=torch.int32)
    plain = causal_mask(torch.arange(6).expand(2, -1), q.dtype, segments, 3)
    short = Mask(cu_seqlens=starts, window=3, flash=True)
    torch.testing.assert_close(attention(q, k, v, short), attention(q, k, v, plain))
