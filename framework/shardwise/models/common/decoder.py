"""What decoder-only models share: the call, the head, and embeddings that stay tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shardwise.models.common.cache import KVCache
from shardwise.models.common.config import DecoderConfig

# Shape suffixes: B sequences, T tokens, D model width, V vocabulary.


class Decoder(nn.Module):
    """``model(input_ids_BT, position_ids_BT, segment_ids_BT) -> logits_BTV``.

    A family derives from it, builds ``layers`` and ``norm``, and defines `hidden`.
    """

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Without this, `to_empty` (from meta) would make two weights of a tied one."""
        super()._apply(fn, recurse)
        self._tie()
        return self

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        *,
        dice_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (BTV, compute dtype) of the token after each position.

        Attention stays within equal ``segment_ids_BT`` (None: each row is one document).
        ``dice_BT`` (int64 key a token, `ops.dice.token_dice`) turns dropout on. With a ``cache``,
        the inputs are the new tokens only, and segments are not looked at.
        """
        hidden_BTD = self.hidden(
            input_ids_BT, position_ids_BT, segment_ids_BT, dice_BT=dice_BT, cache=cache
        )
        return self.head(hidden_BTD)  # type: ignore[no-any-return]

    def hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        *,
        dice_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Like `forward`, but the normed activations (BTD) before the head."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Typed for callers; see `forward`."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]
