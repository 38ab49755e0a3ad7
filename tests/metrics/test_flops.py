"""FLOPs against hand-computed sums and figures that others have published."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.metrics.flops import (
    FlopsShape,
    forward_flops_per_token,
    mean_keys,
    training_flops_per_token,
)


def llama3(layers: int, hidden: int, kv_heads: int, heads: int, ffn: int, vocab: int) -> int:
    """Parameters without the input embedding, head included."""
    kv = hidden * kv_heads // heads
    block = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn + 2 * hidden
    return layers * block + hidden + hidden * vocab


def test_by_hand() -> None:
    shape = FlopsShape(num_params=100, num_layers=2, attention_width=3, seq_len=10)
    # forward: 2*100, and in each of 2 layers 2 products of 2*3 FLOPs with 5 keys on average
    assert forward_flops_per_token(shape) == 200 + 2 * 2 * 2 * 3 * 5
    assert training_flops_per_token(shape) == 6 * 100 + 6 * 2 * 3 * 10


# Tokens/s/GPU and TFLOP/s/GPU as printed in NVIDIA's Megatron-Bridge summaries (causal attention).
@pytest.mark.parametrize(
    ("num_params", "layers", "width", "seq_len", "tokens_per_second", "printed"),
    [
        (llama3(32, 4096, 8, 32, 14336, 128256), 32, 4096, 8192, 14079, 725),
        (llama3(126, 16384, 8, 128, 53248, 128256), 126, 16384, 8192, 1048, 2646),
        (llama3(80, 8192, 8, 64, 28672, 128256), 80, 8192, 4096, 4819, 2083),
    ],
)
def test_published_causal(
    num_params: int, layers: int, width: int, seq_len: int, tokens_per_second: int, printed: int
) -> None:
    flops = training_flops_per_token(FlopsShape(num_params, layers, width, seq_len))
    assert tokens_per_second * flops / 1e12 == pytest.approx(printed, rel=0.005)


# MosaicML's llm-foundry table: MPT-7b, full attention, 6N with the tied embedding counted once.
def test_published_full() -> None:
    shape = FlopsShape(6_658_859_008, 32, 4096, 2048, causal=False)
    assert 9670 * training_flops_per_token(shape) / 1e12 == pytest.approx(417, rel=0.01)


@given(
    st.integers(1, 10_000),
    st.integers(1, 20_000),
)
def test_window_matches_counting(seq_len: int, window: int) -> None:
    seq_len, window = min(seq_len, 500), min(window, 700)
    counted = sum(min(i + 1, window) for i in range(seq_len)) / seq_len
    # the convention drops the half key of the diagonal
    assert mean_keys(seq_len, sliding_window=window) == pytest.approx(counted, abs=0.5 + 1e-9)
    assert mean_keys(seq_len) == seq_len / 2
    assert mean_keys(seq_len, causal=False) == seq_len
