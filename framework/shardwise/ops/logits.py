"""Logits as a layout leaves them: perhaps some of the vocabulary, perhaps some of the tokens.

Losses read them through `losses.logprobs`, which sees no layout: log-probabilities come back for
all tokens of the micro-batch, and no rank ever holds logits of the whole vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwise.ops import comm
from shardwise.ops.cross_entropy import Shard, entropy, token_logprobs
from shardwise.ops.words import top_words, word_logprobs

# Shape suffixes: B sequences, T tokens, t tokens of this rank, V vocabulary, W words of this rank.


@dataclasses.dataclass(frozen=True)
class Logits:
    """This rank's part of the logits of a micro-batch.

    ``local`` [B, t, W] holds the words from ``offset`` on, of the tokens ``index_t`` (None: all) of
    a micro-batch that was padded from ``num_tokens`` to ``padded``; or [N, W], where of these
    tokens those under the loss mask alone were computed. ``gather`` turns this rank's part of a
    per-token tensor into the padded whole, differentiably.
    """

    local: Tensor
    offset: int = 0
    vocab_group: dist.ProcessGroup | None = None
    index_t: Tensor | None = None
    padded: int = 0
    num_tokens: int = 0
    gather: Callable[[Tensor], Tensor] | None = None
    valid_N: Tensor | None = None  # of these tokens, those under the loss mask, where it is known
    num_rows: int = 0  # B

    @property
    def shard(self) -> Shard | None:
        """The vocabulary's cut; None if it is whole here."""
        if self.vocab_group is None:
            return None
        return Shard(self.offset, self.vocab_group)

    def own(self, x_BT: Tensor) -> Tensor:
        """This rank's tokens of a tensor whose first dimensions are BT."""
        if self.index_t is None:
            return x_BT
        behind = (0, 0) * (x_BT.dim() - 2)
        return F.pad(x_BT, (*behind, 0, self.padded - self.num_tokens))[:, self.index_t]

    @property
    def selects(self) -> bool:
        """Whether tokens under the loss mask alone were computed."""
        return self.local.dim() == 2

    def valid(self, mask_BT: Tensor, valid_N: Tensor | None) -> Tensor:
        """Indices of the flattened mask among this rank's tokens; ``valid_N``: of them all."""
        if valid_N is not None and self.index_t is not None:
            valid_N = self.valid_N
        elif valid_N is None and self.selects:
            raise ValueError(
                "of these logits, tokens under the loss mask alone were computed: pass "
                "valid_N=batch.valid(), or leave the mark reads_valid off what reads others"
            )
        return self.own(mask_BT).flatten().nonzero().flatten() if valid_N is None else valid_N

    def rows(self, valid_N: Tensor) -> Tensor:
        """Logits (NW) of these of this rank's tokens."""
        return self.local if self.selects else self.local.flatten(0, 1).index_select(0, valid_N)

    def spread(self, x_N: Tensor, valid_N: Tensor) -> Tensor:
        """Numbers (or rows of them) of this rank's valid tokens, as those of all tokens, else 0."""
        if self.selects:
            B, t = self.num_rows, self.num_tokens if self.index_t is None else len(self.index_t)
        else:
            B, t = self.local.shape[:2]
        zeros = torch.zeros((B * t, *x_N.shape[1:]), dtype=x_N.dtype, device=x_N.device)
        return self.gather_tokens(zeros.index_copy(0, valid_N, x_N).unflatten(0, (B, t)))

    def per_token(self, x: Tensor) -> Tensor:
        """A number for each token that was computed, as those of all tokens, else 0."""
        if not self.selects:
            return self.gather_tokens(x)
        assert self.valid_N is not None
        return self.spread(x, self.valid_N)

    def gather_tokens(self, x_Bt: Tensor) -> Tensor:
        """All tokens, from every rank's."""
        if self.index_t is None:
            return x_Bt
        whole_BT = x_Bt if self.gather is None else self.gather(x_Bt)
        return whole_BT[:, : self.num_tokens]


def as_logits(logits: Tensor | Logits) -> Logits:
    """Plain logits are a part that is everything."""
    return logits if isinstance(logits, Logits) else Logits(logits)


def selected_logprobs(
    logits: Tensor | Logits,
    targets_BT: Tensor,
    mask_BT: Tensor,
    temperature: float = 1.0,
    valid_N: Tensor | None = None,
    kept_BTK: Tensor | None = None,
) -> Tensor:
    """Log-probability (BT, fp32; fp64 for fp64 logits) of each target under the mask, else 0.

    With ``kept_BTK`` (int64; negative: nothing), of the distribution over those words alone. Rows
    outside of the mask are not read: what stands there, NaN included, reaches neither the
    value nor the gradient. ``valid_N``: indices of the flattened mask, if it is the loss mask; a
    device would have to be waited for to count them.
    """
    part = as_logits(logits)
    targets_Bt = part.own(targets_BT)
    valid_N = part.valid(mask_BT, valid_N)
    whole = not part.selects and kept_BTK is None
    if whole and valid_N.numel() == targets_Bt.numel():  # spares pre-training the copy below
        return part.gather_tokens(token_logprobs(part.local, targets_Bt, temperature, part.shard))
    rows_NW = part.rows(valid_N)
    targets_N = targets_Bt.flatten().index_select(0, valid_N)
    if kept_BTK is not None:
        kept_NK = part.own(kept_BTK).flatten(0, 1).index_select(0, valid_N)
        rows_NW = _only(rows_NW, kept_NK - part.offset)
    logp_N = token_logprobs(rows_NW, targets_N, temperature, part.shard)
    return part.spread(logp_N, valid_N)


_LEAST = -1e30  # a logit of what cannot be drawn; finite, also over any temperature


def _only(rows_NW: Tensor, kept_NK: Tensor) -> Tensor:
    """Rows of logits of which the columns ``kept_NK`` count; those beyond the rows are no one's."""
    num_rows, width = rows_NW.shape
    column_NK = torch.where((kept_NK >= 0) & (kept_NK < width), kept_NK, width)
    dropped = torch.ones(num_rows, width + 1, dtype=torch.bool, device=rows_NW.device)
    dropped.scatter_(1, column_NK, False)
    return rows_NW.masked_fill(dropped[:, :width], _LEAST)


def likeliest_words(
    logits: Tensor | Logits, mask_BT: Tensor, k: int, valid_N: Tensor | None = None
) -> Tensor:
    """The ``k`` likeliest words (BTK, int64), best first, of each token under the mask, else 0."""
    part = as_logits(logits)
    valid_N = part.valid(mask_BT, valid_N)
    return part.spread(top_words(part.rows(valid_N), k, part.shard), valid_N)


def selected_words(
    logits: Tensor | Logits,
    ids_BTK: Tensor,
    mask_BT: Tensor,
    temperature: float = 1.0,
    valid_N: Tensor | None = None,
) -> Tensor:
    """`ops.words.word_logprobs` of each token under the mask (BT, K + 1), else 0."""
    part = as_logits(logits)
    ids_NK = part.own(ids_BTK).flatten(0, 1)
    valid_N = part.valid(mask_BT, valid_N)
    ids_NK = ids_NK.index_select(0, valid_N)
    logp_NK = word_logprobs(part.rows(valid_N), ids_NK, temperature, part.shard)
    return part.spread(logp_NK, valid_N)


def selected_values(outputs: Tensor | Logits, mask_BT: Tensor) -> Tensor:
    """A scalar head's number (BT, fp32; fp64 for fp64) at each token under the mask, else 0.

    Under tensor parallelism each rank has a part of the sum.
    """
    part = as_logits(outputs)
    wide = torch.float64 if part.local.dtype == torch.float64 else torch.float32
    values_Bt = part.local.sum(dim=-1, dtype=wide)
    if part.vocab_group is not None:
        values_Bt = _SumParts.apply(values_Bt, part.vocab_group)
    return torch.where(mask_BT, part.per_token(values_Bt), 0.0)


class _SumParts(torch.autograd.Function):
    """A sum over ranks that all go on to compute the same loss: each part's gradient is its own."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        return comm.all_reduce(part.clone(), group, "tp")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@torch.no_grad()
def entropies(logits: Tensor | Logits, temperature: float = 1.0) -> Tensor:
    """Entropy in nats (BT) of each token's distribution, 0 where none was computed; no gradient."""
    part = as_logits(logits)
    return part.per_token(entropy(part.local, temperature, part.shard))


@torch.no_grad()
def greedy_tokens(logits: Tensor | Logits) -> Tensor:
    """The likeliest token (BT, int64); of equals, the first. 0 where no logits were computed."""
    part = as_logits(logits)
    if part.vocab_group is None:
        return part.per_token(part.local.argmax(dim=-1))
    if part.local.shape[-1]:
        best_Bt, index_Bt = part.local.max(dim=-1)
    else:
        best_Bt = part.local.new_full(part.local.shape[:-1], -torch.inf)
        index_Bt = torch.zeros(best_Bt.shape, dtype=torch.int64, device=best_Bt.device)
    top_Bt = comm.all_max(best_Bt.clone(), part.vocab_group, "tp")
    huge = torch.iinfo(torch.int64).max
    winner_Bt = torch.where(best_Bt == top_Bt, index_Bt + part.offset, huge)
    return part.per_token(-comm.all_max(-winner_Bt, part.vocab_group, "tp"))
