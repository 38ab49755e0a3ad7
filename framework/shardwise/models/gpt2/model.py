"""GPT-2 (Radford et al. 2019), plain and on one device.

The fused query-key-value projection of the original is three linear layers here, so that tensor
parallelism and LoRA treat every family alike; import and export split and join it.
"""

from __future__ import annotations

from torch import Tensor, nn

from shardwise.models.common.blocks import Attention, Block, Dropout, GeluMLP
from shardwise.models.common.decoder import Decoder
from shardwise.models.gpt2.config import GPT2Config
from shardwise.ops import rng

# Shape suffixes: B sequences, T tokens, D model width, V vocabulary.

_EMBED_SALT = 0


def _block(config: GPT2Config) -> Block:
    d, heads, eps = config.hidden_size, config.num_heads, config.norm_eps
    attn = Attention(
        d,
        heads,
        heads,
        config.head_width,
        qkv_bias=True,
        o_bias=True,
        dropout=config.attn_dropout,
    )
    mlp = GeluMLP(d, config.ffn_width)
    return Block(nn.LayerNorm(d, eps), attn, nn.LayerNorm(d, eps), mlp, config.dropout)


class GPT2(Decoder):
    """A decoder of the family; see `Decoder` for the call."""

    config: GPT2Config
    compiled_decoding = True
    entry = ("embed", "pos_embed")

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.pos_embed = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.embed_drop = Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def embed_tokens(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, rng_keys_BT: Tensor | None
    ) -> Tensor:
        """Token and position embeddings, with dropout."""
        x_BTD = self.embed(input_ids_BT) + self.pos_embed(position_ids_BT)
        # Layers fold in 0, 1, ...; the embedding takes the index after the last.
        keys_BT = None if rng_keys_BT is None else rng.fold(rng_keys_BT, self.config.num_layers)
        return self.embed_drop(x_BTD, keys_BT, _EMBED_SALT)  # type: ignore[no-any-return]
