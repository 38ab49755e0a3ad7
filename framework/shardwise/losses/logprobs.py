"""The log-probabilities of a micro-batch's valid targets."""

from __future__ import annotations

from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import reads_valid
from shardwise.ops.logits import Logits, selected_logprobs

# Shape suffixes: B rows, T tokens, V vocabulary, K words.

KEPT_WORDS = "kept_words_BTK"  # extra: the words that sampling left of each target's, -1 behind


@reads_valid
def valid_logprobs(
    logits_BTV: Tensor | Logits, batch: MicroBatch, temperature: float = 1.0
) -> Tensor:
    """Log-probability of each valid target under ``logits / temperature``, exactly 0 elsewhere.

    [B, T], fp32 (fp64 for fp64 logits), for all tokens on every layout: of logits that are cut
    along the vocabulary or the tokens, the ranks exchange log-probabilities. Masked rows of the
    logits are not even read; prompts and padding cost no softmax. Where top-k or top-p acted when
    the targets were drawn, the batch has `KEPT_WORDS`, and the distribution is over those.
    """
    kept_BTK = batch.extras.get(KEPT_WORDS)
    return selected_logprobs(
        logits_BTV, batch.targets_BT, batch.loss_mask_BT, temperature, batch.valid(), kept_BTK
    )
