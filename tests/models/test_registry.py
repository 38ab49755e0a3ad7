"""Building by family, and the arithmetic of parameters against real modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shardwise.config.registry import MODEL_CONFIGS
from shardwise.errors import ConfigError
from shardwise.models.common.sharding import style_of
from shardwise.models.configs import TABLES
from shardwise.models.dense.gpt2 import GPT2Config
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.registry import build, config_class, families, sharding


def test_families_are_registered_with_the_config_room() -> None:
    assert set(families()) == set(TABLES)
    for family in families():
        assert MODEL_CONFIGS[family] is config_class(family)
    with pytest.raises(ConfigError, match="known: arcee, cohere, cohere2, ernie4_5, exaone4"):
        config_class("gtp2")


def test_vocabulary_must_be_known() -> None:
    config = GPT2Config(hidden_size=8, num_layers=1, num_heads=2)
    with pytest.raises(ConfigError, match="tokenizer"):
        build(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 3},
        {"hidden_size": 30},
        {"head_dim": 5},
        {"qk_nrom": True},
        {"rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 8}},
        {"rope_scaling": {"kind": "longrope", "factor": 2.0}},
    ],
)
def test_impossible_sizes(changes: dict[str, Any]) -> None:
    good = {"vocab_size": 9, "hidden_size": 32, "num_layers": 1, "num_heads": 4}
    good |= {"num_kv_heads": 2, "ffn_size": 8}
    LlamaConfig(**good)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        LlamaConfig(**good | changes)  # type: ignore[arg-type]


LLAMAS = st.builds(
    LlamaConfig,
    vocab_size=st.integers(1, 50),
    hidden_size=st.sampled_from([8, 24]),
    num_layers=st.integers(1, 3),
    num_heads=st.sampled_from([2, 4]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([None, 6]),
    ffn_size=st.integers(1, 30),
    tie_embeddings=st.booleans(),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    qk_norm=st.booleans(),
)
GPT2S = st.builds(
    GPT2Config,
    vocab_size=st.integers(1, 50),
    max_seq_len=st.integers(1, 30),
    hidden_size=st.sampled_from([8, 24]),
    num_layers=st.integers(1, 3),
    num_heads=st.sampled_from([2, 4]),
    ffn_size=st.sampled_from([None, 10]),
    tie_embeddings=st.booleans(),
)


@settings(deadline=None, max_examples=40)
@given(st.one_of(LLAMAS, GPT2S))
def test_counts_and_sharding_cover_real_modules(config: Any) -> None:
    with torch.device("meta"):
        model = build(config)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert config.spec.shapes() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(config.spec.shapes()) == list(sizes)
    counts = config.spec.param_counts()
    assert config.num_parameters() == sum(sizes.values())
    assert counts["layers"] == sum(n for name, n in sizes.items() if name.startswith("layers."))
    assert counts["norm"] == sum(n for name, n in sizes.items() if name.startswith("norm."))
    assert counts["head"] == sizes.get("head.weight", 0)
    assert config.spec.matmul_parameters() == (
        counts["layers"] + counts["norm"] + model.head.weight.numel()  # type: ignore[union-attr]
    )
    table = sharding(config)
    assert all(style_of(table, name) is not None for name in sizes)


def test_every_row_of_a_sharding_table_is_needed() -> None:
    """No pattern is dead, so a renamed module cannot leave its row behind."""
    full = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        ffn_size=8,
        qk_norm=True,
        tie_embeddings=False,
    )
    gpt2 = GPT2Config(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, tie_embeddings=False)
    for config in (full, gpt2):
        names = [f"{path}.weight" for path, _ in build(config).named_modules()]
        table = sharding(config)
        for rule in table:
            others = [r for r in table if r != rule]
            assert any(style_of(others, name) is None for name in names), rule
