"""Next-token cross-entropy: the loss of pre-training and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import LossOutput, reads_valid
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops.logits import Logits, greedy_tokens

# Shape suffixes: B rows, T tokens, V vocabulary.


class CausalLM:
    """-log p(target) summed over the valid tokens; its count is their number.

    ``accuracy`` adds the metric of that name: the share of valid tokens that greedy decoding hits.
    """

    def __init__(self, accuracy: bool = False) -> None:
        self.weights: Mapping[str, float] = {"loss": 1.0}
        self.accuracy = accuracy

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """The valid tokens."""
        return {"loss": batch.loss_mask_BT.sum(dtype=torch.float64)}

    @reads_valid
    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """The sum in nats over this micro-batch; zero, with zero gradient, if nothing is valid."""
        loss = -valid_logprobs(logits_BTV, batch).sum()
        if not self.accuracy:
            return LossOutput({"loss": loss})
        with torch.no_grad():
            hits_BT = (greedy_tokens(logits_BTV) == batch.targets_BT) & batch.loss_mask_BT
        hits = hits_BT.sum(dtype=torch.float64)
        return LossOutput({"loss": loss}, {"accuracy": (hits, self.counts(batch)["loss"])})
