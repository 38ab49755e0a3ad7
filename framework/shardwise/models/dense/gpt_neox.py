"""GPT-NeoX (Black et al. 2022) and Pythia: attention beside the feed-forward, each with a norm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shardwise.models.common.spec import ModelSpec, NormSpec
from shardwise.models.dense.names import Names
from shardwise.models.dense.partial_rope import PartialConfig, partial_rope
from shardwise.models.dense.release import ATTENTION_BIAS, KEYS, Part, Release


class GPTNeoXConfig(PartialConfig):
    """Layer norms, and biases in the feed-forward."""

    family: Literal["gpt_neox"] = "gpt_neox"
    partial_rotary_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.25, description="share of a head's features that is rotated", examples=[0.25]
    )
    qkv_bias: bool = Field(True, description="biases of queries, keys and values")
    o_bias: bool = Field(True, description="bias of attention's output")
    parallel: bool = Field(
        True, description="the feed-forward reads what attention reads, not what it adds"
    )

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        return self.make_spec(
            NormSpec(kind="layer", eps=self.norm_eps),
            parallel=self.parallel,
            gated=False,
            activation="gelu",
            qkv_bias=self.qkv_bias,
            o_bias=self.o_bias,
            mlp_bias=True,
        )


# Its class knows no heads that share keys and values.
_ALL_HEADS = Part((), lambda raw: {"num_kv_heads": raw["num_attention_heads"]}, lambda c: {})
RELEASE = Release(
    model_type="gpt_neox",
    name="GPTNeoX",
    config=GPTNeoXConfig,
    sizes=(50_432, 6144, 24_576, 44, 64),
    base_keys={ours: theirs for ours, theirs in KEYS.items() if ours != "num_kv_heads"},
    keys={"norm_eps": "layer_norm_eps", "parallel": "use_parallel_residual"},
    only={"hidden_act": ("gelu",), "hidden_dropout": (0.0,)},
    defaults={"layer_norm_eps": 1e-5, "use_parallel_residual": True, "attention_bias": True},
    parts=(_ALL_HEADS, partial_rope(0.25, "rotary_emb_base", "rotary_pct"), ATTENTION_BIAS),
)
NAMES = Names(
    prefix="gpt_neox.",
    layers="gpt_neox.layers.",
    ends={"embed": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm"},
    head="embed_out.weight",
    layer={
        "attn_norm": "input_layernorm",
        ("attn.q", "attn.k", "attn.v"): "attention.query_key_value",
        "attn.o": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    by_head=frozenset({"attention.query_key_value"}),
    ignore=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)
