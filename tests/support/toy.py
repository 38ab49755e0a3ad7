"""Tiny models and batches that several test files share."""

from __future__ import annotations

import torch

from shardwise.data.batch import MicroBatch
from shardwise.models.dense.gpt2 import GPT2Config
from shardwise.models.dense.llama import LlamaConfig


def llama(**changes: object) -> LlamaConfig:
    """Two layers, grouped-query attention, tied embeddings."""
    fields: dict[str, object] = {
        "family": "llama",
        "vocab_size": 61,
        "max_seq_len": 32,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_size": 48,
        "tie_embeddings": True,
    }
    return LlamaConfig.model_validate(fields | changes)


def gpt2(**changes: object) -> GPT2Config:
    """Two layers with dropout."""
    fields: dict[str, object] = {
        "family": "gpt2",
        "vocab_size": 61,
        "max_seq_len": 32,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "dropout": 0.1,
    }
    return GPT2Config.model_validate(fields | changes)


def batch(rows: int, tokens: int = 12, vocab: int = 61, seed: int = 0) -> MicroBatch:
    """Random rows with uneven loss masks; row 0 carries a single valid token."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, tokens, generator=g) < 0.6
    mask[0] = False
    mask[0, -1] = True
    ids = torch.randint(0, vocab, (rows, tokens + 1), generator=g)
    return MicroBatch(
        input_ids_BT=ids[:, :-1],
        position_ids_BT=torch.arange(tokens).expand(rows, -1).clone(),
        targets_BT=ids[:, 1:].clone(),
        loss_mask_BT=mask,
        sample_ids_B=torch.arange(rows),
    )
