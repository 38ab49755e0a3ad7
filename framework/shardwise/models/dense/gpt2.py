"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shardwise.config.schema import BelowOne, Epsilon, SeqLen
from shardwise.models.common.config import DecoderConfig, Width
from shardwise.models.common.spec import LayerSpec, ModelSpec, NormSpec
from shardwise.models.dense.names import Names
from shardwise.models.dense.release import Release


class GPT2Config(DecoderConfig):
    """A decoder with layer norm, learned positions, biases and GELU."""

    family: Literal["gpt2"] = "gpt2"
    max_seq_len: SeqLen = 1024
    ffn_size: Width | None = Field(None, description="null: 4 * hidden_size", examples=[3072])
    norm_eps: Epsilon = Field(1e-5, description="added to the variance in norms")
    embed_dropout: BelowOne = Field(0.0, description="behind the embeddings", examples=[0.1])
    attn_dropout: BelowOne = Field(0.0, description="of attention's weights", examples=[0.1])
    dropout: BelowOne = Field(
        0.0, description="after attention and after the feed-forward", examples=[0.1]
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> GPT2Config:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_heads "
                f"({self.num_heads})"
            )
        return self

    @property
    def spec(self) -> ModelSpec:
        """See `DecoderConfig.spec`."""
        norm = NormSpec(kind="layer", eps=self.norm_eps)
        layer = LayerSpec(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            kv_heads=self.num_heads,
            head_width=self.head_width,
            ffn_size=self.ffn_size or 4 * self.hidden_size,
            norm=norm,
            qkv_bias=True,
            o_bias=True,
            attn_dropout=self.attn_dropout,
            gated=False,
            activation="gelu_tanh",
            mlp_bias=True,
            dropout=self.dropout,
        )
        return ModelSpec(
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            head_size=self.head_size,
            tied=self.tie_embeddings,
            layers=(layer,) * self.num_layers,
            norm=norm,
            learned_positions=self.max_seq_len,
            embed_dropout=self.embed_dropout,
        )


RELEASE = Release(
    model_type="gpt2",
    name="GPT2",
    decoder="LMHeadModel",
    config=GPT2Config,
    base_keys={
        "vocab_size": "vocab_size",
        "max_seq_len": "n_positions",
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "ffn_size": "n_inner",
        "norm_eps": "layer_norm_epsilon",
        "embed_dropout": "embd_pdrop",
        "attn_dropout": "attn_pdrop",
        "dropout": "resid_pdrop",
    },
    defaults={
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
)
NAMES = Names(
    prefix="transformer.",
    layers="transformer.h.",
    ends={"embed": "transformer.wte", "pos_embed": "transformer.wpe", "norm": "transformer.ln_f"},
    layer={
        "attn_norm": "ln_1",
        ("attn.q", "attn.k", "attn.v"): "attn.c_attn",
        "attn.o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    },
    transposed=frozenset({".c_attn", ".c_proj", ".c_fc"}),  # Conv1D
    ignore=(".attn.bias", ".attn.masked_bias"),  # constant masks that old checkpoints carry
)
