"""Who computes logits for the generator: the plain model anywhere, `native.py` on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.models.common.decoder import Decoder
from shardwise.parallel.tensor import widen_logits
from shardwise.rollout import sampling as sampling_
from shardwise.rollout.cache import SlotCache
from shardwise.rollout.config import Sampling

# Shape suffixes: B prompts, T tokens, N rows, V vocabulary, D model width.


class PlainBackend:
    """The plain model with a slot cache; on any device and for every family."""

    key_tile = 1

    def __init__(self, model: Decoder) -> None:
        self.model = model
        widen_logits(model)  # as the trainer's are
        self.config = model.config
        self.cache = self._new_cache(1, 16)

    def refresh(self) -> None:
        """The model's weights have changed."""

    def served(self) -> dict[str, Tensor]:
        """The weights that decoding really uses, under our names."""
        return dict(self.model.named_parameters())

    def allocate(self, num_slots: int, capacity: int) -> None:
        """Make room for ``num_slots`` sequences of ``capacity`` tokens, empty or not."""
        if self.cache.v.shape[1::2] != (num_slots, capacity):
            self.cache = self._new_cache(num_slots, capacity)

    def _new_cache(self, num_slots: int, capacity: int) -> SlotCache:
        weight = next(self.model.parameters())
        return SlotCache(
            self.config.num_layers,
            num_slots,
            self.config.kv_heads,
            capacity,
            self.config.head_width,
            dtype=weight.dtype,
            device=weight.device,
            key_tile=self.key_tile,
        )

    def prefill(self, ids_BT: Tensor, lengths_B: Tensor, slots: Tensor, source: Tensor) -> Tensor:
        """Fill slots from prompts padded on the right; logits (BV) after each prompt's end.

        Slot ``slots[i]`` gets prompt ``source[i]``; ``source`` is ascending and names every prompt.
        """
        self.cache.prefill_into(slots, source)
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        rows_B = torch.arange(len(lengths_B), device=ids_BT.device)
        if type(self.model).forward is not Decoder.forward:  # then logits are its own to compute
            logits_BTV = self.model(ids_BT, positions_BT, cache=self.cache)
            self.cache.decode()
            return logits_BTV[rows_B, lengths_B - 1]
        hidden_BTD = self.model.hidden(ids_BT, positions_BT, cache=self.cache)
        self.cache.decode()
        return self.model.logits(hidden_BTD[rows_B, lengths_B - 1])

    def decode(self, tokens_N: Tensor, positions_N: Tensor) -> Tensor:
        """Append a token to each of the first N slots; logits (NV) after it."""
        logits_N1V = self.model(tokens_N[:, None], positions_N[:, None], cache=self.cache)
        return logits_N1V[:, 0]  # type: ignore[no-any-return]

    def choose(
        self, logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `sampling.choose`."""
        return sampling_.choose(logits_NV, sampling, uniform_N)
