"""What one process writes for stages to start from: it can be read, and is not what models are."""

from __future__ import annotations

from pathlib import Path

import torch

from shardwise.checkpoint import adapted
from shardwise.checkpoint.convert import open_model
from shardwise.models.dense.llama import LlamaConfig
from shardwise.verify import starts
from tests.support.pool import RankPool

MODEL = LlamaConfig(
    family="llama",
    vocab_size=32,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=24,
)


def test_models_of_both_heads_and_a_folder(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(starts.write_models, tmp_path, MODEL, torch.float64, world=1)
    initial = dict(adapted.initial_tensors(MODEL, starts.SEED))
    words = dict(open_model(tmp_path / "words").tensors)
    folder = dict(open_model(tmp_path / "folder").tensors)
    assert words.keys() == folder.keys() == initial.keys()
    assert all(value.dtype == torch.float64 for value in words.values())
    assert all(value.equal(folder[name].double()) for name, value in words.items())
    assert not any(value.float().equal(initial[name]) for name, value in words.items())
    assert open_model(tmp_path / "scores").config == MODEL.as_scalar()


def test_a_model_that_transformers_has_no_class_for_has_no_folder(
    ranks: RankPool, tmp_path: Path
) -> None:
    odd = MODEL.model_copy(update={"qkv_bias": True, "qk_norm": True})
    ranks.run(starts.write_models, tmp_path, odd, torch.float32, world=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scores", "words"]
