"""The Llama family in Hugging Face's layout: config.json and tensor names.

transformers has one class per release of the family; the switches of our config choose among
LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import CheckpointError
from shardwise.models.common.hf import HEADS, Rule, head_from_hf, head_to_hf
from shardwise.models.llama.config import LlamaConfig, RopeScalingConfig

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
PREFIX = "model."
IGNORE = (".rotary_emb.inv_freq",)
# Keys that `config_from_hf` reads and `config_to_hf` may say in other words.
OTHER_WORDS = (
    "rope_parameters", "layer_types", "use_sliding_window", "sliding_window", "max_window_layers",
    "attention_bias", "mlp_bias",
)  # fmt: skip

# Where a class of transformers does not take what the others do for a key that is not there.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {
        "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32, "max_position_embeddings": 32_768, "sliding_window": 4096,
        "head_dim": 128,
    },
}  # fmt: skip

_LAYER = (
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn.q.weight", "self_attn.q_proj.weight"),
    ("attn.k.weight", "self_attn.k_proj.weight"),
    ("attn.v.weight", "self_attn.v_proj.weight"),
    ("attn.o.weight", "self_attn.o_proj.weight"),
    ("mlp_norm.weight", "post_attention_layernorm.weight"),
    ("mlp.gate.weight", "mlp.gate_proj.weight"),
    ("mlp.up.weight", "mlp.up_proj.weight"),
    ("mlp.down.weight", "mlp.down_proj.weight"),
)
_QKV_BIAS = tuple((f"attn.{x}.bias", f"self_attn.{x}_proj.bias") for x in "qkv")
_O_BIAS = (("attn.o.bias", "self_attn.o_proj.bias"),)
_QK_NORM = tuple((f"attn.{x}_norm.weight", f"self_attn.{x}_norm.weight") for x in "qk")


def rules(config: LlamaConfig) -> list[Rule]:
    """Every tensor of the checkpoint."""
    layer = _LAYER + _QKV_BIAS * config.qkv_bias + _O_BIAS * config.o_bias
    layer += _QK_NORM * config.qk_norm
    found = [Rule("model.embed_tokens.weight", ("embed.weight",))]
    for i in range(config.num_layers):
        found += [Rule(f"model.layers.{i}.{hf}", (f"layers.{i}.{ours}",)) for ours, hf in layer]
    found.append(Rule("model.norm.weight", ("norm.weight",)))
    if not config.tie_embeddings:
        found.append(Rule(HEADS[config.head], ("head.weight",)))
    return found


def config_from_hf(raw: Mapping[str, Any]) -> LlamaConfig:
    """Our config from a config.json; raises CheckpointError for what the family cannot express."""
    kind = raw["model_type"]
    raw = _DEFAULTS.get(kind, {}) | dict(raw)
    _must(raw, "hidden_act", ("silu",))
    _must(raw, "mlp_bias", (False,))
    qwen2 = kind == "qwen2"
    bias = bool(raw.get("attention_bias", False)) and not qwen2
    window, start = _window_from_hf(raw)
    # transformers 5 holds all of it under rope_parameters, 4 under two keys.
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    hidden, heads, head_dim = raw["hidden_size"], raw["num_attention_heads"], raw.get("head_dim")
    base = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    return LlamaConfig(
        vocab_size=raw["vocab_size"],
        max_seq_len=raw.get("max_position_embeddings", 2048),
        hidden_size=hidden,
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=None if head_dim == hidden // heads else head_dim,
        ffn_size=raw["intermediate_size"],
        rope_base=float(base),
        rope_scaling=_rope_from_hf(rope, raw),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        **head_from_hf(raw, tied=bool(raw.get("tie_word_embeddings", False))),
        qkv_bias=qwen2 or bias,
        o_bias=bias,
        qk_norm=kind == "qwen3",
        sliding_window=window,
        window_start_layer=start,
    )


def _must(raw: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if key in raw and raw[key] not in allowed:
        raise CheckpointError(
            f"config.json: {key} = {raw[key]!r} is not supported by the llama family; "
            f"supported: {', '.join(map(repr, allowed))}"
        )


def _window_from_hf(raw: Mapping[str, Any]) -> tuple[int | None, int]:
    """The sliding window and the first layer that uses it."""
    window = raw.get("sliding_window")
    qwen = raw["model_type"].startswith("qwen")
    if (
        raw["model_type"] == "llama"
        or window is None
        or (qwen and not raw.get("use_sliding_window", False))
    ):
        return None, 0
    num_layers = raw["num_hidden_layers"]
    start = raw.get("max_window_layers", 28) if qwen else 0
    kinds = raw.get("layer_types")
    if kinds is not None and not qwen:  # Mistral's class does not look at them
        if set(kinds) != {"sliding_attention"}:
            raise CheckpointError(
                f"config.json: layer_types of {raw['model_type']}: only sliding_attention with a "
                "sliding_window, as its class computes"
            )
    elif kinds is not None:
        if set(kinds) - {"sliding_attention", "full_attention"}:
            raise CheckpointError(
                f"config.json: layer_types {sorted(set(kinds))}: full and sliding attention alone"
            )
        start = kinds.index("sliding_attention") if "sliding_attention" in kinds else num_layers
        if "full_attention" in kinds[start:]:
            raise CheckpointError(
                "config.json: layer_types mixes full attention behind sliding attention; the "
                "llama family has full layers first, then sliding ones"
            )
    return (int(window), int(start)) if start < num_layers else (None, 0)


def _rope_from_hf(rope: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeScalingConfig | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"config.json: rope type {kind!r} is not supported; supported: default, linear, "
            "llama3, yarn (a frequency that depends on the batch's length cannot be the same "
            "computation on every layout)"
        )
    if rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        raise CheckpointError("config.json: yarn with mscale or truncate=false is not supported")
    original = rope.get("original_max_position_embeddings") or raw.get("max_position_embeddings")
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
    numbers = {n: float(rope[n]) for n in names if rope.get(n) is not None}
    return RopeScalingConfig(
        kind=kind,
        factor=float(rope["factor"]),
        original_max_seq_len=original or 2048,
        **numbers,
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 load; raises CheckpointError if no class fits."""
    c = config
    raw: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_seq_len,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_width,
        "intermediate_size": c.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_base,
        "rope_scaling": _rope_to_hf(c),
    }
    if c.qk_norm and c.qkv_bias == c.o_bias:
        name = "Qwen3"
        raw |= {"attention_bias": c.qkv_bias} | _window_to_hf(c)
    elif c.qkv_bias and not c.o_bias and not c.qk_norm:
        name = "Qwen2"
        raw |= _window_to_hf(c)
    elif c.sliding_window and not (c.qkv_bias or c.o_bias or c.qk_norm or c.window_start_layer):
        name = "Mistral"
        raw |= {"sliding_window": c.sliding_window}
    elif not c.sliding_window and not c.qk_norm and c.qkv_bias == c.o_bias:
        name = "Llama"
        raw |= {"attention_bias": c.qkv_bias, "mlp_bias": False}
    else:
        raise CheckpointError(
            "no transformers class has this combination of qkv_bias, o_bias, qk_norm and "
            "sliding_window; see Llama (both biases or none), Mistral (window), Qwen2 (qkv_bias), "
            "Qwen3 (qk_norm)"
        )
    return raw | {"model_type": name.lower()} | head_to_hf(c.head, name, f"{name}ForCausalLM")


def _window_to_hf(c: LlamaConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": c.sliding_window is not None,
        "sliding_window": c.sliding_window,
        "max_window_layers": c.window_start_layer,
    }


def _rope_to_hf(c: LlamaConfig) -> dict[str, Any] | None:
    s = c.rope_scaling
    if s is None:
        return None
    raw: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        raw["original_max_position_embeddings"] = s.original_max_seq_len
    if s.kind == "llama3":
        raw |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        raw |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow}
        if s.attention_factor is not None:
            raw["attention_factor"] = s.attention_factor
    return raw
