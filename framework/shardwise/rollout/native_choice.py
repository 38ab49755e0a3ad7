"""The compiled choice of tokens for CPUs: feeds `choose.cpp`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from shardwise.ops import compiled
from shardwise.rollout.config import Sampling
from shardwise.rollout.sampling import Choice

# Shape suffixes: N rows, V vocabulary.


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled `choose.cpp`. Raises CannotBuildError."""
    return compiled.load(Path(__file__).with_name("choose.cpp"))


def choose(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor, threads: int) -> Choice:
    """As `sampling.choose`, but for rounding: where that decides, a neighbour may be drawn or kept.

    The plain one sorts the vocabulary: for 16 rows of 49,152 words that took 2.5 times as long as a
    model of 135M parameters takes for their logits.
    """
    logits_NV = logits_NV.float()
    if logits_NV.stride(1) != 1:
        logits_NV = logits_NV.contiguous()
    n, vocab = logits_NV.shape
    token_N, logp_N = torch.empty(n, dtype=torch.int64), torch.empty(n)
    rows = (
        *(ctypes.c_void_p(logits_NV.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(vocab)),
        ctypes.c_int64(logits_NV.stride(0)),
    )
    drawn = [ctypes.c_void_p(t.data_ptr()) for t in (uniform_N, token_N, logp_N)]
    if not sampling.filters:
        library().choose_tokens(
            *rows,
            ctypes.c_float(1.0 / sampling.temperature),
            ctypes.c_int64(sampling.greedy),
            *drawn,
            ctypes.c_int(threads),
        )
        return token_N, logp_N, logp_N, None
    behavior_N, count_N = torch.empty(n), torch.empty(n, dtype=torch.int64)
    kept_NV = torch.empty(n, vocab, dtype=torch.int32)
    library().choose_cut_tokens(
        *rows,
        ctypes.c_float(sampling.temperature),
        ctypes.c_int64(sampling.top_k),
        ctypes.c_double(sampling.top_p),
        *drawn,
        *(ctypes.c_void_p(t.data_ptr()) for t in (behavior_N, kept_NV, count_N)),
        ctypes.c_int(threads),
    )
    kept = [row_V[:count].tolist() for row_V, count in zip(kept_NV, count_N.tolist())]
    return token_N, logp_N, behavior_N, kept
