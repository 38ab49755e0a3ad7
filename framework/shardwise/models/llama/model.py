"""The Llama family, plain and on one device.

One model covers Llama 2 and 3, Mistral, Qwen2, Qwen3 and SmolLM2; they differ by the config's
switches alone. Compared with the papers: rotary pairs are the two halves of a head (Hugging Face's
layout), and rotation and norms are computed in fp32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from shardwise.models.common.blocks import Attention, Block, RMSNorm, SwiGLU
from shardwise.models.common.decoder import Decoder
from shardwise.models.llama.config import LlamaConfig
from shardwise.ops import rope

# Shape suffixes: B sequences, T tokens, D model width.


def _block(config: LlamaConfig) -> Block:
    d, eps = config.hidden_size, config.norm_eps
    attn = Attention(
        d,
        config.num_heads,
        config.num_kv_heads,
        config.head_width,
        qkv_bias=config.qkv_bias,
        o_bias=config.o_bias,
        qk_norm_eps=eps if config.qk_norm else None,
    )
    return Block(RMSNorm(d, eps), attn, RMSNorm(d, eps), SwiGLU(d, config.ffn_size), config.dropout)


class Llama(Decoder):
    """A decoder of the family; see `Decoder` for the call."""

    config: LlamaConfig
    compiled_decoding = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def shared_context(self, x_BTD: Tensor, position_ids_BT: Tensor) -> dict[str, Any]:
        """The rotary tables."""
        c = self.config
        tables = rope.tables(position_ids_BT, c.head_width, c.rope_base, c.rope, x_BTD.dtype)
        return {"rope": tables}

    def window_of(self, layer: int) -> int | None:
        """See `LlamaConfig.window_of`."""
        return self.config.window_of(layer)
