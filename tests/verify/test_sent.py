"""Weights that are sent are those that are held, to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from shardwise.checkpoint import adapted
from shardwise.engines.base import Engine
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.registry import to_hf_tensors
from shardwise.verify.sent import checked

MODEL = LlamaConfig(
    family="llama",
    vocab_size=32,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=24,
)


def problems(dtype: torch.dtype) -> list[str]:
    named, found = dict(adapted.initial_tensors(MODEL, 0)), list[str]()
    sent = ((n, t.to(dtype).float() if "q.w" in n else t) for n, t in named.items())
    engine: Engine = SimpleNamespace(  # type: ignore[assignment]
        adapter_config=None,
        full=lambda kind: iter(named.items()),
        weights=lambda: to_hf_tensors(MODEL, sent),
    )
    assert len(list(checked(engine, MODEL, found))) == len(named)
    return found


def test_what_was_rounded_on_the_way_is_told() -> None:
    assert not problems(torch.float32)
    [told] = problems(torch.bfloat16)
    assert "q_proj" in told
