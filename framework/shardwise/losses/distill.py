"""Divergences of a student's distribution from a teacher's, token by token.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; generalised Jensen-Shannon:
Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD), equation 1. Distributions
are over the teacher's likeliest words and one bucket with all others; putting words together never
raises a divergence, and loses nothing where the teacher's rest is small. Of a whole vocabulary
there is no bucket.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import LossOutput, reads_valid
from shardwise.losses.distill_config import DivergenceConfig
from shardwise.ops.logits import Logits, likeliest_words, selected_words

# Shape suffixes: B rows, T tokens, V vocabulary, K words of the teacher, J = K and the bucket.

WORDS, LOGPROBS = "teacher_words_BTK", "teacher_logprobs_BTJ"


@dataclasses.dataclass(frozen=True)
class TeacherWords:
    """What a teacher has to say of valid tokens, as `Engine.forward` takes a function.

    [B, T, K + J] in fp64: its likeliest words, and their log-probabilities with the bucket's.
    """

    config: DivergenceConfig
    vocab_size: int

    @property
    def num_words(self) -> int:
        """K."""
        return min(self.config.top_k or self.vocab_size, self.vocab_size)

    @property
    def num_buckets(self) -> int:
        """J."""
        return self.num_words + (self.num_words < self.vocab_size)

    @reads_valid
    def __call__(self, logits_BTV: Any, batch: MicroBatch) -> Tensor:
        """No gradient."""
        mask_BT, valid_N = batch.loss_mask_BT, batch.valid()
        ids_BTK = likeliest_words(logits_BTV, mask_BT, self.num_words, valid_N)
        logp_BTJ = selected_words(logits_BTV, ids_BTK, mask_BT, self.config.temperature, valid_N)
        return torch.cat((ids_BTK.double(), logp_BTJ[..., : self.num_buckets].double()), dim=-1)

    def compared(self, value: Tensor) -> Tensor:
        """The log-probabilities: near a tie, rounding decides which word it is."""
        return value[..., self.num_words :]


def divergence(teacher_NJ: Tensor, student_NJ: Tensor, config: DivergenceConfig) -> Tensor:
    """Of log-probabilities [N, J], in nats [N]; differentiable in the student's."""
    p_NJ, q_NJ = teacher_NJ, student_NJ
    if config.kind == "forward_kl":
        return kl(p_NJ, q_NJ)
    if config.kind == "reverse_kl":
        return kl(q_NJ, p_NJ)
    beta = config.beta
    m_NJ = torch.logaddexp(p_NJ + math.log(beta), q_NJ + math.log1p(-beta))
    return beta * kl(p_NJ, m_NJ) + (1.0 - beta) * kl(q_NJ, m_NJ)


def kl(p_NJ: Tensor, q_NJ: Tensor) -> Tensor:
    """KL(p, q) of log-probabilities, in nats [N]."""
    return (p_NJ.exp() * (p_NJ - q_NJ)).sum(dim=-1)


class DistillLoss:
    """The divergence summed over valid tokens; its count is their number.

    Reads ``extras`` `WORDS` (int64) and `LOGPROBS` at valid tokens. ``accuracy`` of the metrics:
    how often the student's likeliest of the teacher's words is the teacher's own.
    """

    weights: Mapping[str, float] = {"divergence": 1.0}

    def __init__(self, config: DivergenceConfig) -> None:
        self.config = config

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """Valid tokens."""
        return {"divergence": batch.loss_mask_BT.sum(dtype=torch.float64)}

    @reads_valid
    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        """The sum in nats over this micro-batch."""
        valid_N = batch.valid()
        student_NJ = self._student(logits_BTV, batch).flatten(0, 1)[valid_N]
        teacher_NJ = batch.extras[LOGPROBS].flatten(0, 1)[valid_N].to(student_NJ.dtype)
        with torch.no_grad():
            words = batch.extras[WORDS].shape[-1]
            number = student_NJ.new_full((), len(valid_N), dtype=torch.float64)
            mass_N = student_NJ[:, :words].double().exp().sum(dim=-1)
        return LossOutput(
            {"divergence": divergence(teacher_NJ, student_NJ, self.config).sum()},
            {"top_mass": (mass_N.sum(), number)},
        )

    @reads_valid
    def per_token(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> Tensor:
        """The divergence at each valid token [B, T], else 0; as `Engine.forward` takes it."""
        found_BT = divergence(
            batch.extras[LOGPROBS], self._student(logits_BTV, batch).double(), self.config
        )
        return torch.where(batch.loss_mask_BT, found_BT, 0.0)

    def _student(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> Tensor:
        words_BTK, mask_BT = batch.extras[WORDS], batch.loss_mask_BT
        temperature, valid_N = self.config.temperature, batch.valid()
        found_BTJ = selected_words(logits_BTV, words_BTK, mask_BT, temperature, valid_N)
        return found_BTJ[..., : batch.extras[LOGPROBS].shape[-1]]
