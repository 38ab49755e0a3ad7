"""What decoder-only models share: the call, the head, and embeddings that stay tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from shardwise.models.common.blocks import Context
from shardwise.models.common.cache import KVCache
from shardwise.models.common.config import DecoderConfig
from shardwise.ops import rng
from shardwise.ops.attention import Mask, causal_mask

# Shape suffixes: B sequences, T tokens, D model width, V vocabulary.

Masks = Callable[[int | None], Any]  # the mask of a layer with this sliding window


class Decoder(nn.Module):
    """``model(input_ids_BT, position_ids_BT, segment_ids_BT) -> logits_BTV`` (V 1: a scalar head).

    A family derives from it, builds ``layers`` and ``norm``, and defines `embed_tokens` and, where
    layers differ, `context`. A part of a model (`keep`) holds some of its layers; absent modules
    are None.
    """

    # Whether `rollout/native.py` computes what this very class does. Never inherited: a subclass
    # may compute otherwise, and says it anew if it does not.
    compiled_decoding = False
    layers: nn.ModuleList
    norm: nn.Module
    entry: tuple[str, ...] = ("embed",)  # modules in front of the layers
    exit: tuple[str, ...] = ("norm", "head")  # modules behind them

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.head_size, bias=False)
        self.retie()

    def retie(self) -> None:
        """Make the head's weight the embedding's again, after either was replaced."""
        if self.config.tie_embeddings and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:
        """Without this, `to_empty` (from meta) would make two weights of a tied one."""
        super()._apply(fn, recurse)
        self.retie()
        return self

    def keep(self, layers: range) -> None:
        """Drop all layers but these, and what stands at an end of the model that is not held.

        The last part of a model with tied embeddings keeps the embedding, under its own name, as
        the head's weight.
        """
        first, last = 0 in layers, self.config.num_layers - 1 in layers
        tied_head = last and self.config.tie_embeddings
        for i in range(self.config.num_layers):
            if i not in layers:
                self.layers._modules[str(i)] = None  # type: ignore[assignment]
        for name in (*(() if first else self.entry), *(() if last else self.exit)):
            if not (name == "embed" and tied_head):
                setattr(self, name, None)
        self.is_first, self.is_last = first, last

    is_first = True
    is_last = True

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        *,
        rng_keys_BT: Tensor | None = None,
        cache: KVCache | None = None,
        masks: Masks | None = None,
        x_BTD: Tensor | None = None,
    ) -> Tensor:
        """Logits (BTV, compute dtype) of the token after each position.

        Attention stays within equal ``segment_ids_BT`` (None: each row is one document), unless
        ``masks`` says otherwise. ``rng_keys_BT`` (int64 key a token, `ops.rng.token_keys`) turns
        dropout on. With a ``cache``, the inputs are the new tokens only, and segments are not
        looked at. ``x_BTD`` are the activations of the layer before this part of a model; a part
        without the last layer returns activations.
        """
        hidden_BTD = self.hidden(
            input_ids_BT,
            position_ids_BT,
            segment_ids_BT,
            rng_keys_BT=rng_keys_BT,
            cache=cache,
            masks=masks,
            x_BTD=x_BTD,
        )
        return self.head(hidden_BTD) if self.is_last else hidden_BTD

    def hidden(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_ids_BT: Tensor | None = None,
        *,
        rng_keys_BT: Tensor | None = None,
        cache: KVCache | None = None,
        masks: Masks | None = None,
        x_BTD: Tensor | None = None,
    ) -> Tensor:
        """Like `forward`, but the normed activations (BTD) before the head."""
        if x_BTD is None:
            x_BTD = self.embed_tokens(input_ids_BT, position_ids_BT, rng_keys_BT)
        if cache is not None:
            cache.begin(position_ids_BT)
            masks = cache.mask
        elif masks is None:
            masks = _plain_masks(x_BTD, position_ids_BT, segment_ids_BT)
        by_window = {w: masks(w) for w in {self.window_of(i) for i in range(len(self.layers))}}
        shared = self.shared_context(x_BTD, position_ids_BT)
        for i, block in enumerate(self.layers):
            if block is None:
                continue
            context = Context(
                mask=by_window[self.window_of(i)],
                rng_keys_BT=None if rng_keys_BT is None else rng.fold(rng_keys_BT, i),
                cache=cache,
                layer=0 if cache is None else i,
                **shared,
            )
            x_BTD = block(x_BTD, context)
        return self.norm(x_BTD) if self.is_last else x_BTD

    def embed_tokens(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, rng_keys_BT: Tensor | None
    ) -> Tensor:
        """Activations (BTD) in front of the first layer."""
        return self.embed(input_ids_BT)  # type: ignore[no-any-return]

    def shared_context(self, x_BTD: Tensor, position_ids_BT: Tensor) -> dict[str, Any]:
        """Fields of `Context` that all layers share, computed once."""
        return {}

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, None for full attention."""
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Typed for callers; see `forward`."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


def _plain_masks(
    x_BTD: Tensor, position_ids_BT: Tensor, segment_ids_BT: Tensor | None
) -> Callable[[int | None], Mask]:
    def mask(window: int | None) -> Mask:
        return causal_mask(position_ids_BT, x_BTD.dtype, segment_ids_BT, window)

    return mask
