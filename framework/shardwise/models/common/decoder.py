"""What decoder-only models share: the call, the head, and embeddings that stay tied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.models.common.blocks import Context
from shardwise.models.common.cache import KVCache
from shardwise.models.common.config import DecoderConfig
from shardwise.ops import rng, rope
from shardwise.ops.attention import Mask, causal_mask

# Shape suffixes: B sequences, T tokens, D model width, V vocabulary.

Masks = Callable[[int | None], Any]  # the mask of a layer with this sliding window


class Decoder(nn.Module):
    """``model(input_ids_BT, position_ids_BT, segment_ids_BT) -> logits_BTV`` (V 1: a scalar head).

    A model derives from it and builds ``layers`` and ``norm`` as the config's `ModelSpec` says. A
    part of a model (`keep`) holds some of its layers; absent modules are None.
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
        self.config, self.spec = config, config.spec
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
        read_N: Tensor | None = None,
    ) -> Tensor:
        """Logits (BTV, compute dtype) of the token after each position.

        Attention stays within equal ``segment_ids_BT`` (None: each row is one document), unless
        ``masks`` says otherwise. ``rng_keys_BT`` (int64 key a token, `ops.rng.token_keys`) turns
        dropout on. With a ``cache``, the inputs are the new tokens only, and segments are not
        looked at. ``x_BTD`` are the activations of the layer before this part of a model; a part
        without the last layer returns activations. ``read_N``: indices of the flattened tokens
        that logits are wanted of (NV); None: all.
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
        if not self.is_last:
            return hidden_BTD
        if read_N is not None:
            hidden_BTD = hidden_BTD.flatten(0, 1).index_select(0, read_N)
        return self.logits(hidden_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The head's outputs for normed activations."""
        return self.shape_logits(self.head(hidden_BTD))

    def shape_logits(self, logits_BTV: Tensor) -> Tensor:
        """What the head gives, scaled and capped as the spec says; of a scalar head, as it is."""
        spec = self.spec
        if self.config.head == "scalar":
            return logits_BTV
        if spec.logit_scale != 1.0:
            logits_BTV = logits_BTV * spec.logit_scale
        if spec.logit_soft_cap is not None:
            logits_BTV = torch.tanh(logits_BTV / spec.logit_soft_cap) * spec.logit_soft_cap
        return logits_BTV

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
        held = [(i, b, self.spec.layers[i]) for i, b in enumerate(self.layers) if b is not None]
        # Each mask and each table of positions once, however many layers share it.
        by_window = {w: masks(w) for w in {s.window for _, _, s in held}}
        by_rope = {
            r: None if r is None else rope.tables(position_ids_BT, r, x_BTD.dtype)
            for r in {s.rope for _, _, s in held}
        }
        by_growth = {
            g: None if g is None else rope.query_scale(position_ids_BT, g, x_BTD.dtype)
            for g in {s.query_growth for _, _, s in held}
        }
        for i, block, spec in held:
            context = Context(
                mask=by_window[spec.window],
                rope=by_rope[spec.rope],
                query_scale_B1T1=by_growth[spec.query_growth],
                rng_keys_BT=None if rng_keys_BT is None else rng.fold(rng_keys_BT, i),
                cache=cache,
                layer=0 if cache is None else i,
            )
            x_BTD = block(x_BTD, context)
        return self.norm(x_BTD) if self.is_last else x_BTD

    def embed_tokens(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor, rng_keys_BT: Tensor | None
    ) -> Tensor:
        """Activations (BTD) in front of the first layer."""
        x_BTD: Tensor = self.embed(input_ids_BT)
        if (scale := self.spec.embed_scale) != 1.0:
            # Rounded as the weights are: Gemma was trained so.
            x_BTD = x_BTD * torch.tensor(scale, dtype=x_BTD.dtype, device="cpu").item()
        return x_BTD

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Typed for callers; see `forward`."""
        return super().__call__(*args, **kwargs)  # type: ignore[no-any-return]


def _plain_masks(
    x_BTD: Tensor, position_ids_BT: Tensor, segment_ids_BT: Tensor | None
) -> Callable[[int | None], Mask]:
    def mask(window: int | None) -> Mask:
        return causal_mask(position_ids_BT, x_BTD.dtype, segment_ids_BT, window)

    return mask
