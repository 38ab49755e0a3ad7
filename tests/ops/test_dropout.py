"""Dropout: right mean, same mask on every layout and dtype, right gradient."""

from __future__ import annotations

import pytest
import torch

from shardwise.ops import rng
from shardwise.ops.dropout import dropout, keep_mask

KEYS = rng.token_keys(0, 1, "test", torch.arange(8), torch.arange(32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keeps_the_mean(p: float) -> None:
    out = dropout(torch.ones(8, 32, 400), p, KEYS, salt=0)
    # 102,400 draws: the standard error of the mean is sqrt(p / (1 - p) / n); allow five.
    assert abs(float(out.mean()) - 1) < 5 * (p / (1 - p) / out.numel()) ** 0.5
    assert set(out.unique().tolist()) == {0.0, out.max().item()}
    assert float(out.max()) == pytest.approx(1 / (1 - p))


def test_off_without_dice_or_probability() -> None:
    x = torch.randn(8, 32, 4)
    assert dropout(x, 0.5, None, salt=0) is x
    assert dropout(x, 0.0, KEYS, salt=0) is x


def test_slices_of_features_and_rows_draw_their_part() -> None:
    x = torch.randn(8, 32, 24)
    whole = dropout(x, 0.3, KEYS, salt=2)
    left = dropout(x[..., :10], 0.3, KEYS, salt=2)
    right = dropout(x[..., 10:], 0.3, KEYS, salt=2, feature_offset=10)
    assert torch.equal(whole, torch.cat((left, right), dim=-1))
    assert torch.equal(whole[3:5], dropout(x[3:5], 0.3, KEYS[3:5], salt=2))
    assert not torch.equal(whole, dropout(x, 0.3, KEYS, salt=3))


def test_mask_is_the_same_in_every_dtype() -> None:
    masks = [
        dropout(torch.ones(8, 32, 16, dtype=dtype), 0.3, KEYS, salt=0) != 0
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_gradient() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: dropout(t, 0.4, KEYS[:2, :3], salt=1), (x,))


def test_operator_is_known_to_the_compiler() -> None:
    """Shapes under fake tensors agree with the real ones (schema, aliasing, fake kernel)."""
    torch.library.opcheck(keep_mask, (KEYS, 7, 0.3, 5))
