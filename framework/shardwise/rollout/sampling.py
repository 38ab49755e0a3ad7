"""From logits to tokens, by inverting the cumulated distribution at a given uniform number.

The uniforms are pure functions of (key, prompt id, sample id, token index), so a completion does
not depend on what else is in the batch. Logits are divided by the temperature everywhere, and two
log-probabilities are kept apart: of the whole distribution, and of the one that top-k and top-p
left and renormalised (the behaviour policy). Without filters they are equal; with them, the words
that were left are kept too (the sampling mask): whoever trains must renormalise as was sampled.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardwise.ops import rng
from shardwise.rollout.config import Sampling

# Shape suffixes: N rows, V vocabulary.


def row_keys(key: int, prompt_ids_N: Tensor, sample_ids_N: Tensor) -> Tensor:
    """Rng keys (int64 N) of completions, by their global names alone."""
    base_N = torch.full_like(prompt_ids_N, key)
    return rng.fold(rng.fold(base_N, prompt_ids_N), sample_ids_N)


def uniform_at(row_keys_N: Tensor, token_index_N: Tensor) -> Tensor:
    """Float64 N in (0, 1): the number that decides token ``token_index_N[n]`` of row n."""
    return rng.uniform(rng.fold(row_keys_N, token_index_N), torch.float64)


def filtered(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside the top k, then outside the nucleus, set to -inf.

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p``
    (Holtzman et al. 2020); of equal tokens at its edge, those of lower id are kept.
    """
    sorted_NV, order_NV = logits_NV.sort(dim=-1, descending=True, stable=True)
    drop_NV = torch.zeros_like(sorted_NV, dtype=torch.bool)
    if top_k > 0:
        drop_NV[:, top_k:] = True
    if top_p < 1.0:
        kept_NV = sorted_NV.masked_fill(drop_NV, -math.inf)
        before_NV = kept_NV.softmax(-1).cumsum(-1).roll(1, dims=-1)
        before_NV[:, 0] = 0.0
        drop_NV |= before_NV >= top_p
    return logits_NV.masked_fill(drop_NV.scatter(1, order_NV, drop_NV), -math.inf)


Choice = tuple[Tensor, Tensor, Tensor, list[list[int]] | None]


def choose(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Choice:
    """Tokens (int64 N), their log-probabilities before filters, and after them (fp32 or fp64 N).

    And the words that the filters left of each row, ascending; None without filters. Logits in fp64
    are not narrowed, so that what is computed in fp64 differs by rounding in fp64 alone.
    """
    wide_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    z_NV = wide_NV / sampling.temperature
    logp_NV = z_NV.log_softmax(-1)
    if sampling.greedy:
        token_N = z_NV.argmax(-1)
        logp_N = logp_NV.gather(1, token_N[:, None])[:, 0]
        return token_N, logp_N, logp_N, None
    kept_NV, left = logp_NV, None
    if sampling.filters:
        cut_NV = filtered(z_NV, sampling.top_k, sampling.top_p)
        kept_NV = cut_NV.log_softmax(-1)
        left_NV = cut_NV > -math.inf
        words = left_NV.nonzero()[:, 1].split(left_NV.sum(1).tolist())
        left = [some.tolist() for some in words]
    cdf_NV = kept_NV.double().exp().cumsum(-1)
    target_N1 = uniform_N[:, None] * cdf_NV[:, -1:]
    token_N = torch.searchsorted(cdf_NV, target_N1)[:, 0].clamp_max(z_NV.shape[-1] - 1)
    full_N, kept_N = (t.gather(1, token_N[:, None])[:, 0] for t in (logp_NV, kept_NV))
    return token_N, full_N, kept_N, left
