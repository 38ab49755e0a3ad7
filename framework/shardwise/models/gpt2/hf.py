"""GPT-2 in Hugging Face's layout: config.json and tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import CheckpointError
from shardwise.models.common.hf import HEADS, Rule, head_from_hf, head_to_hf
from shardwise.models.gpt2.config import GPT2Config

MODEL_TYPES = ("gpt2",)
PREFIX = "transformer."
IGNORE = (".attn.bias", ".attn.masked_bias")  # constant masks that old checkpoints carry
OTHER_WORDS = ()  # see llama/hf.py

_QKV = ("attn.q", "attn.k", "attn.v")
# Ours, theirs, and whether it is a Conv1D, whose weight is (in, out).
_LAYER = (
    (("attn_norm",), "ln_1", False),
    (_QKV, "attn.c_attn", True),
    (("attn.o",), "attn.c_proj", True),
    (("mlp_norm",), "ln_2", False),
    (("mlp.up",), "mlp.c_fc", True),
    (("mlp.down",), "mlp.c_proj", True),
)


def rules(config: GPT2Config) -> list[Rule]:
    """Every tensor of the checkpoint."""
    found = [
        Rule("transformer.wte.weight", ("embed.weight",)),
        Rule("transformer.wpe.weight", ("pos_embed.weight",)),
    ]
    for i in range(config.num_layers):
        for ours, theirs, is_conv in _LAYER:
            for kind in ("weight", "bias"):
                names = tuple(f"layers.{i}.{name}.{kind}" for name in ours)
                transpose = is_conv and kind == "weight"
                found.append(Rule(f"transformer.h.{i}.{theirs}.{kind}", names, transpose))
    found += [Rule(f"transformer.ln_f.{kind}", (f"norm.{kind}",)) for kind in ("weight", "bias")]
    if not config.tie_embeddings:
        found.append(Rule(HEADS[config.head], ("head.weight",)))
    return found


def config_from_hf(raw: Mapping[str, Any]) -> GPT2Config:
    """Our config from a config.json; raises CheckpointError for what the family cannot express."""
    for key, allowed in {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }.items():
        if key in raw and raw[key] not in allowed:
            raise CheckpointError(
                f"config.json: {key} = {raw[key]!r} is not supported by the gpt2 family; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
    return GPT2Config(
        vocab_size=raw["vocab_size"],
        max_seq_len=raw["n_positions"],
        hidden_size=raw["n_embd"],
        num_layers=raw["n_layer"],
        num_heads=raw["n_head"],
        ffn_size=raw.get("n_inner"),
        norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        **head_from_hf(raw, tied=bool(raw.get("tie_word_embeddings", True))),
        embed_dropout=raw.get("embd_pdrop", 0.1),
        attn_dropout=raw.get("attn_pdrop", 0.1),
        dropout=raw.get("resid_pdrop", 0.1),
    )


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """A config.json that transformers loads."""
    return {
        "model_type": "gpt2",
        **head_to_hf(config.head, "GPT2", "GPT2LMHeadModel"),
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.ffn_size,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.embed_dropout,
        "attn_pdrop": config.attn_dropout,
        "resid_pdrop": config.dropout,
        "activation_function": "gelu_new",
    }
