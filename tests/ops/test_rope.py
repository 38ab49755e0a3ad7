"""Rotary positions against transformers' tables, and the properties that define them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.ops import rope
from shardwise.ops.rope_scaling import RopeScaling, RopeSpec

transformers = pytest.importorskip("transformers", exc_type=ImportError)

SCALINGS: dict[str, tuple[RopeScaling | None, dict[str, Any]]] = {
    "default": (None, {"rope_type": "default"}),
    "linear": (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "yarn": (
        RopeScaling("yarn", 4.0, 64),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn, own factor": (
        RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
    ),
    "yarn, two temperatures": (
        RopeScaling("yarn", 4.0, 64, truncate=False, mscale=1.5, mscale_all_dim=0.5),
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
        },
    ),
    "longrope": (
        RopeScaling("longrope", 4.0, 64, pair_factors=tuple(1.0 + i for i in range(16))),
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0 + i for i in range(16)],
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers(name: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    ours, theirs = SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 5e5, **theirs},
    )
    positions = torch.arange(256)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    our_cos, our_sin = rope.tables(positions, RopeSpec(width=32, base=5e5, scaling=ours))
    # An angle of 255 is known to 1.5e-5.
    torch.testing.assert_close(our_cos, cos[..., :16], atol=2e-5, rtol=0)
    torch.testing.assert_close(our_sin, sin[..., :16], atol=2e-5, rtol=0)


def test_tables_are_fp32_or_fp64() -> None:
    positions = torch.arange(4)[None]
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        tables = rope.tables(positions, RopeSpec(width=8, base=1e4), dtype)
        assert tables[0].dtype == expected


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 2000))
def test_scores_depend_on_distance_alone(i: int, j: int, shift: int) -> None:
    """The defining property: rotating both by the same amount changes no score."""
    generator = torch.Generator().manual_seed(i * 501 + j)
    q, k = torch.randn(2, 1, 1, 1, 32, generator=generator, dtype=torch.float64)

    def score(a: int, b: int) -> float:
        spec = RopeSpec(width=32, base=1e4)
        tables = [rope.tables(torch.tensor([[p]]), spec, torch.float64) for p in (a, b)]
        return float((rope.rotate(q, *tables[0]) * rope.rotate(k, *tables[1])).sum())

    assert score(i, j) == pytest.approx(score(i + shift, j + shift), abs=1e-9)


@pytest.mark.parametrize("turned", [4, 8])
def test_pairs_of_neighbours_turn_as_those_of_halves(turned: int) -> None:
    """The same rotation of the same features in another order; the rest stays."""
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    spec = RopeSpec(width=turned, base=100.0, interleaved=True)
    tables = rope.tables(torch.arange(5).expand(2, -1), spec, torch.float64)
    order = torch.arange(turned).view(-1, 2).t().flatten()  # 0, 2, ..., 1, 3, ...
    order = torch.cat((order, torch.arange(turned, 8)))
    found = rope.rotate(x, *tables, interleaved=True)
    torch.testing.assert_close(found[..., order], rope.rotate(x[..., order], *tables))
