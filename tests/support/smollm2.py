"""What `configs/smollm2/prepare.py` writes, without the weights of SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardwise.data.tokenizer import ByteTokenizer

START = Path("runs/smollm2/model")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 100000.0, "tie_word_embeddings": True, "torch_dtype": "float32",
    "vocab_size": 49152,
}  # fmt: skip
# What the recipes said themselves when docs/results were measured.
SAID: dict[str, Any] = {
    "model": {
        "family": "llama", "hidden_size": 576, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3,
        "ffn_size": 1536, "max_seq_len": 8192, "rope_base": 1e5, "tie_embeddings": True,
    },
    "tokenizer": {"kind": "file", "path": f"{START}/tokenizer.json"},
}  # fmt: skip

FORMATS = {"messages": "chat-jsonl", "preference": "preference-jsonl"}  # by their names then


def write_start(folder: Path) -> None:
    """The model's folder below ``folder``: its config, another tokenizer, an empty file."""
    place = folder / START
    ByteTokenizer().save(place)
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "model.safetensors").touch()
