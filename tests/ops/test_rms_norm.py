"""RMS norm against torch's own, and its dtypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shardwise.ops.rms_norm import rms_norm


def test_equals_torch() -> None:
    x, w = torch.randn(5, 7, 16), torch.randn(16)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), F.rms_norm(x, (16,), w, 1e-5))


def test_half_precision_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)  # no exact value lies on a rounding edge
    x, w = (torch.randn(*s, generator=g).bfloat16() for s in ((64, 32), (32,)))
    exact = rms_norm(x.double(), w.double(), 1e-6)
    assert rms_norm(x, w, 1e-6).dtype == torch.bfloat16
    assert torch.equal(rms_norm(x, w, 1e-6), exact.float().bfloat16())


def test_gradient_in_fp64() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-5), (x, w))
