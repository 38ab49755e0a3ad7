"""The Llama family, plain and on one device.

One model covers Llama 2 and 3, Mistral, Qwen2, Qwen3 and SmolLM2; they differ by the config's
switches alone. Compared with the papers: rotary pairs are the two halves of a head (Hugging Face's
layout), and rotation and norms are computed in fp32.
"""

from __future__ import annotations

from torch import Tensor, nn

from shardwise.models.common.blocks import Attention, Block, Context, RMSNorm, SwiGLU
from shardwise.models.common.cache import KVCache
from shardwise.models.common.decoder import Decoder
from shardwise.models.llama.config import LlamaConfig
from shardwise.ops import dice, rope
from shardwise.ops.attention import Mask, causal_mask

# Shape suffixes: B sequences, T tokens, D model width, V vocabulary.


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

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

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
        c = self.config
        x_BTD = self.embed(input_ids_BT)
        tables = rope.tables(position_ids_BT, c.head_width, c.rope_base, c.rope, x_BTD.dtype)
        masks = self._masks(x_BTD, position_ids_BT, segment_ids_BT, cache)
        for i, block in enumerate(self.layers):
            context = Context(
                mask=masks[c.window_of(i)],
                rope=tables,
                dice_BT=None if dice_BT is None else dice.fold(dice_BT, i),
                cache=cache,
                layer=0 if cache is None else i,
            )
            x_BTD = block(x_BTD, context)
        return self.norm(x_BTD)  # type: ignore[no-any-return]

    def _masks(
        self,
        x_BTD: Tensor,
        position_ids_BT: Tensor,
        segment_ids_BT: Tensor | None,
        cache: KVCache | None,
    ) -> dict[int | None, Mask]:
        """One mask for each window that occurs among the layers."""
        windows = {self.config.window_of(i) for i in range(self.config.num_layers)}
        if cache is not None:
            cache.begin(position_ids_BT)
            return {window: cache.mask(window) for window in windows}
        return {
            window: causal_mask(x_BTD, segment_ids_BT, window, position_ids_BT)
            for window in windows
        }
