"""The dense decoder, plain and on one device: one class for all families of this folder.

They differ by their `ModelSpec` alone. Compared with the papers: rotary pairs are the two halves of
what is rotated (Hugging Face's layout), rotation and norms are computed in fp32, and projections
that a release fuses (queries, keys and values; gate and up) are linear layers of their own, so that
tensor parallelism and LoRA treat every family alike; import and export split and join them.
"""

from __future__ import annotations

from torch import Tensor, nn

from shardwise.models.common.blocks import Block, Dropout, make_norm
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.ops import rng

# Shape suffixes: B sequences, T tokens, D model width.

_EMBED_SALT = 0


class Dense(Decoder):
    """A dense decoder; see `Decoder` for the call."""

    compiled_decoding = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        spec = self.spec
        if spec.learned_positions is not None:
            self.pos_embed = nn.Embedding(spec.learned_positions, spec.hidden_size)
            self.embed_drop = Dropout(spec.embed_dropout)
            self.entry = ("embed", "pos_embed")
        self.layers = nn.ModuleList(Block(layer) for layer in spec.layers)
        self.norm = make_norm(spec.norm, spec.hidden_size)

    def embed_tokens(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, rng_keys_BT: Tensor | None
    ) -> Tensor:
        """Token embeddings; with learned positions, these are added, and dropout follows."""
        x_BTD = super().embed_tokens(input_ids_BT, position_ids_BT, rng_keys_BT)
        if self.spec.learned_positions is None:
            return x_BTD
        x_BTD = x_BTD + self.pos_embed(position_ids_BT)
        # Layers fold in 0, 1, ...; the embedding takes the index after the last.
        keys_BT = None if rng_keys_BT is None else rng.fold(rng_keys_BT, len(self.layers))
        return self.embed_drop(x_BTD, keys_BT, _EMBED_SALT)  # type: ignore[no-any-return]
