"""gpt-oss's attention against transformers': sinks, windows, yarn without truncation, biases."""

from __future__ import annotations

import math

import pytest
import torch

from shardwise.models.common.blocks import Attention, Context
from shardwise.models.common.spec import LayerSpec, NormSpec
from shardwise.ops import rope
from shardwise.ops.attention import causal_mask
from shardwise.ops.rope_scaling import RopeScaling, RopeSpec

transformers = pytest.importorskip("transformers", exc_type=ImportError)
from transformers.models.gpt_oss import modeling_gpt_oss as theirs  # noqa: E402

YARN = RopeScaling("yarn", factor=32.0, original_max_seq_len=64, truncate=False)


@pytest.mark.parametrize("window", [5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_and_gradients_equal(window: int | None, dtype: torch.dtype) -> None:
    config = transformers.GptOssConfig(
        hidden_size=64,
        head_dim=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=1,
        sliding_window=window,
        layer_types=["full_attention" if window is None else "sliding_attention"],
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 64,
        },
        attn_implementation="eager",
    )  # fmt: skip
    spec = LayerSpec(
        hidden_size=64,
        num_heads=8,
        kv_heads=2,
        head_width=16,
        ffn_size=1,
        norm=NormSpec(),
        window=window,
        rope=RopeSpec(width=16, base=150_000.0, scaling=YARN),
        sinks=True,
        qkv_bias=True,
        o_bias=True,
    )
    torch.manual_seed(0)
    peer, ours = theirs.GptOssAttention(config, 0).to(dtype), Attention(spec).to(dtype)
    names = {"sinks": "sinks.weight"} | {
        f"{x}_proj.{kind}": f"{x}.{kind}" for x in "qkvo" for kind in ("weight", "bias")
    }
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype) * 0.3)
            ours.get_parameter(names[name]).copy_(parameter)
    x_BTD = torch.randn(2, 40, 64, dtype=dtype)
    positions = torch.arange(40).expand(2, -1)
    # Their table is fp32: ours goes in on both sides, and is compared with theirs by itself.
    table = rope.tables(positions, spec.rope, dtype)  # type: ignore[arg-type]
    cos, sin = theirs.GptOssRotaryEmbedding(config)(x_BTD, positions)
    for a, b in zip(table, (cos, sin), strict=True):
        torch.testing.assert_close(a.to(dtype), b[..., :8].to(dtype), atol=1e-5, rtol=0)
    mask = causal_mask(positions, dtype, None, window)
    behind = positions[:1, :, None] - positions[:1, None, :]
    seen = (behind >= 0) & (behind < (window or 40))
    bias = torch.where(seen, 0.0, -math.inf).to(dtype)[None]
    own = ours(x_BTD, Context(mask, table))
    expected = peer(x_BTD, (table[0], table[1]), bias)[0]
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(own, expected, atol=bound, rtol=bound)
    own.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in peer.named_parameters():
        found = ours.get_parameter(names[name]).grad
        assert found is not None and parameter.grad is not None
        assert float((found - parameter.grad).norm()) <= bound * float(parameter.grad.norm()), name
