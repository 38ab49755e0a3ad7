"""GPT-2 (Radford et al. 2019), plain and on one device.

The fused query-key-value projection of the original is three linear layers here, so that tensor
parallelism and LoRA treat every family alike; import and export split and join it.
"""

from __future__ import annotations

from torch import Tensor, nn

from shardwise.models.common.blocks import Attention, Block, Context, GeluMLP
from shardwise.models.common.cache import KVCache
from shardwise.models.common.decoder import Decoder
from shardwise.models.gpt2.config import GPT2Config
from shardwise.ops import dice
from shardwise.ops.attention import causal_mask
from shardwise.ops.dropout import dropout

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

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.pos_embed = nn.Embedding(config.max_seq_len, config.hidden_size)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        *,
        dice_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See `Decoder.hidden`."""
        x_BTD = self.embed(input_ids_BT) + self.pos_embed(position_ids_BT)
        # Layers fold in 0, 1, ...; the embedding takes the index after the last.
        if dice_BT is not None:
            keys_BT = dice.fold(dice_BT, self.config.num_layers)
            x_BTD = dropout(x_BTD, self.config.embed_dropout, keys_BT, _EMBED_SALT)
        if cache is None:
            mask = causal_mask(x_BTD, segment_ids_BT)
        else:
            cache.begin(position_ids_BT)
            mask = cache.mask(None)
        for i, block in enumerate(self.layers):
            context = Context(
                mask=mask,
                dice_BT=None if dice_BT is None else dice.fold(dice_BT, i),
                cache=cache,
                layer=0 if cache is None else i,
            )
            x_BTD = block(x_BTD, context)
        return self.norm(x_BTD)  # type: ignore[no-any-return]
