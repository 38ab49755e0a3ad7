"""Token log-probabilities and entropy against torch, over dtypes, chunks and temperatures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import compiled, cpu_softmax, cross_entropy
from shardwise.ops.cross_entropy import entropy, token_logprobs


def _reference(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logp = torch.log_softmax(logits / temperature, dim=-1)
    return logp.gather(-1, targets[..., None])[..., 0]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(2, 40),
    st.sampled_from([1.0, 0.7, 2.0]),
    st.integers(1, 100),
)
def test_values_and_gradients_in_fp64(
    num_rows: int, num_tokens: int, vocab: int, temperature: float, chunk: int
) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(num_rows, num_tokens, vocab, dtype=torch.float64) * 5).requires_grad_()
    targets = torch.randint(vocab, (num_rows, num_tokens))
    weight = torch.randn(num_rows, num_tokens, dtype=torch.float64)
    before = cross_entropy._CPU_CHUNK_ELEMENTS
    try:
        cross_entropy._CPU_CHUNK_ELEMENTS = chunk
        got = token_logprobs(logits, targets, temperature)
        (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    finally:
        cross_entropy._CPU_CHUNK_ELEMENTS = before
    expected = _reference(logits, targets, temperature)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), logits)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9),
    st.integers(1, 70),
    st.sampled_from([1.0, 0.7, 2.0]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_the_kernel_for_cpu_equals_math(
    num_rows: int, vocab: int, temperature: float, dtype: torch.dtype, strided: bool
) -> None:
    torch.manual_seed(vocab)
    whole = (torch.randn(num_rows, vocab + 3) * 5).to(dtype)
    logits = (whole[:, :vocab] if strided else whole[:, :vocab].contiguous()).requires_grad_()
    assert cpu_softmax.serves(logits) == (compiled.unusable(cpu_softmax.library) is None)
    targets, weight = torch.randint(vocab, (num_rows,)), torch.randn(num_rows)
    got = token_logprobs(logits[None], targets[None], temperature)[0]
    (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    exact = logits.detach().double().requires_grad_()
    expected = _reference(exact, targets, temperature)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), exact)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected_grad, atol=2e-6, rtol=tolerance * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_words_and_what_is_not_a_number(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 20, dtype=torch.float64).to(dtype)
    logits[:, 17:] = -torch.inf  # words that do not exist
    logits[1, 4] = torch.nan
    logits.requires_grad_()
    got = token_logprobs(logits[None], torch.zeros(1, 3, dtype=torch.int64))[0]
    assert got.isnan().tolist() == [False, True, False]
    (grad,) = torch.autograd.grad(got[0] + got[2], logits)
    assert bool((grad[[0, 2], 17:] == 0).all()) and bool(grad[[0, 2]].isfinite().all())


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(1, 5, 40), torch.randint(40, (1, 5))
    expected = token_logprobs(logits, targets)

    def broken() -> None:
        raise compiled.CannotBuildError("no compiler")

    monkeypatch.setattr(cpu_softmax, "library", broken)
    assert not cpu_softmax.serves(logits[0])
    torch.testing.assert_close(token_logprobs(logits, targets), expected)


def test_gradcheck() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, 0.7), (logits,))


def test_half_precision_logits() -> None:
    """Only the logits' own rounding is lost, and the gradient is in their dtype."""
    logits = (torch.randn(2, 8, 100) * 4).bfloat16().requires_grad_()
    targets = torch.randint(100, (2, 8))
    got = token_logprobs(logits, targets)
    assert got.dtype == torch.float32
    exact = _reference(logits.detach().double(), targets, 1.0)
    torch.testing.assert_close(got.double(), exact, atol=2e-6, rtol=2e-6)
    got.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    wide = logits.detach().double().requires_grad_()
    _reference(wide, targets, 1.0).sum().backward()
    assert wide.grad is not None
    torch.testing.assert_close(logits.grad.double(), wide.grad, atol=1e-6, rtol=2**-8)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    logp = token_logprobs(logits, torch.tensor([[1]]))
    logp.sum().backward()
    assert float(logp.detach()) == -2e4
    assert logits.grad is not None and torch.equal(logits.grad, torch.tensor([[[-1.0, 1.0, 0.0]]]))


def test_only_logits_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between forward and backward nothing of the size of fp32 logits is kept."""
    logits = torch.randn(2, 8, 1000).bfloat16().requires_grad_()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        token_logprobs(logits, torch.randint(1000, (2, 8)))
    large = [t for t in saved if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in large] == [logits.data_ptr()]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy(temperature: float) -> None:
    logits = torch.randn(2, 8, 50, dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits / temperature, -1)
    got = entropy(logits, temperature)
    torch.testing.assert_close(got, -(logp.exp() * logp).sum(-1), atol=1e-12, rtol=1e-12)
    assert not got.requires_grad


def test_entropy_with_forbidden_tokens() -> None:
    logits = torch.tensor([[0.0, 0.0, float("-inf")], [3.0, float("-inf"), float("-inf")]])
    torch.testing.assert_close(entropy(logits), torch.tensor([2.0, 1.0]).log())
