"""The log-probabilities of a micro-batch's valid targets."""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.ops.cross_entropy import token_logprobs

# Shape suffixes: B rows, T tokens, V vocabulary, N valid tokens.


def valid_logprobs(logits_BTV: Tensor, batch: MicroBatch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each valid target under ``logits / temperature``, exactly 0 elsewhere.

    [B, T], fp32 (fp64 for fp64 logits). Masked rows of the logits are not even read, so what
    stands there, NaN included, reaches neither the value nor the gradient; prompts and padding
    cost no softmax.
    """
    mask_BT = batch.loss_mask_BT
    if bool(mask_BT.all()):  # spares pre-training the copy below
        logp_BT: Tensor = token_logprobs(logits_BTV, batch.targets_BT, temperature)
        return logp_BT
    logp_N = token_logprobs(logits_BTV[mask_BT], batch.targets_BT[mask_BT], temperature)
    zeros_BT = torch.zeros(mask_BT.shape, dtype=logp_N.dtype, device=logp_N.device)
    return zeros_BT.masked_scatter(mask_BT, logp_N)
