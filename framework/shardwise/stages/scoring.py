"""How likely a model finds continuations of texts, on any engine and layout.

Texts become tokens as the evaluation harness of EleutherAI (lm-eval 0.4) makes them, so that its
figures and ours are the same: context and continuation are encoded together and cut behind the
context's own tokens, with what the tokenizer itself puts before a text (a BOS, if any).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.data.tokenizer import Tokenizer
from shardwise.engines.base import Engine
from shardwise.losses.contract import reads_valid
from shardwise.losses.logprobs import valid_logprobs
from shardwise.models import travel
from shardwise.ops.logits import greedy_tokens
from shardwise.stages.base import data_shard, micro_batches

# Shape suffixes: B rows, T tokens, V vocabulary, N continuations.

Pair = tuple[Sequence[int], Sequence[int]]  # context, continuation; neither empty
_BUCKET = 32  # lengths are multiples of it, so that a compiled model sees few


class TextEncoder:
    """Token ids of texts, with what the tokenizer's own file adds to both ends of each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        backend = Backend.from_str(tokenizer.files()[travel.TOKENIZER].decode())
        inside = backend.encode("a", add_special_tokens=False).ids
        whole = backend.encode("a").ids
        starts = range(len(whole) - len(inside) + 1)
        at = next((i for i in starts if whole[i : i + len(inside)] == inside), 0)
        self.before, self.after = whole[:at], whole[at + len(inside) :]

    @property
    def start_id(self) -> int:
        """What stands before a text that nothing else precedes."""
        bos = self.tokenizer.bos_id
        return self.tokenizer.eos_id if bos is None else bos

    def encode(self, text: str) -> list[int]:
        """Control tokens in ``text`` are read as such; of a BOS that it begins with, no second."""
        ids = self.tokenizer.encode(text, allow_special=True)
        if text.startswith(self.tokenizer.token_of(self.start_id)):
            return ids
        return [*self.before, *ids, *self.after]

    def pair(self, context: str, continuation: str) -> Pair:
        """Spaces at the end of a context belong to the continuation's first token."""
        if not context:
            return [self.start_id], self.tokenizer.encode(continuation, allow_special=True)
        kept = context.rstrip()
        ids = self.encode(kept)
        return ids, self.encode(context + continuation)[len(ids) :]


def score(
    engine: Engine, pairs: Sequence[Pair], micro_batch: int, max_seq_len: int
) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether greedy decoding would write it) of each continuation.

    Every rank of the world gets all of them; a collective call. Contexts of pairs that are too long
    for ``max_seq_len`` lose their first tokens. Summed in fp64.
    """
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found_N2 = np.zeros((len(pairs), 2))
    chunk = micro_batch * engine.data_size
    for start in range(0, len(pairs), chunk):
        those = order[start : start + chunk]
        mine, real = data_shard(len(those), engine)
        if not len(mine):
            continue
        rows = [pairs[those[i]] for i in mine]
        [batch] = micro_batches(_batch(rows, start + mine, max_seq_len), real, micro_batch)
        [scores_B2] = engine.forward([batch], _scores)
        for i, row in zip(mine[:real], scores_B2.tolist()):
            found_N2[those[i]] = row
    # On ranks that share rows, the same: they are one data rank.
    sums = engine.sum_over_data(found_N2.flatten().tolist())
    return [(sums[2 * i], sums[2 * i + 1] == 1.0) for i in range(len(pairs))]


@reads_valid
def _scores(logits: Any, batch: MicroBatch) -> Tensor:
    """B2, fp64: summed log-probabilities; 1.0 where every valid target is the likeliest token."""
    logp_BT = valid_logprobs(logits, batch)
    hit_BT = (greedy_tokens(logits) == batch.targets_BT) | ~batch.loss_mask_BT
    columns = (logp_BT.sum(dim=-1, dtype=torch.float64), hit_BT.all(dim=-1).double())
    return torch.stack(columns, dim=-1)


def _batch(pairs: Sequence[Pair], sample_ids: np.ndarray, max_seq_len: int) -> MicroBatch:
    """A row a pair, padded on the right, which causal attention cannot see."""
    whole = [[*context, *continuation][-(max_seq_len + 1) :] for context, continuation in pairs]
    longest = max(len(ids) - 1 for ids in whole)
    T = min(max_seq_len, -(-longest // _BUCKET) * _BUCKET)
    input_ids = np.zeros((len(pairs), T), dtype=np.int64)
    targets = np.zeros((len(pairs), T), dtype=np.int64)
    mask = np.zeros((len(pairs), T), dtype=np.bool_)
    for row, (ids, (_, continuation)) in enumerate(zip(whole, pairs)):
        end = len(ids) - 1
        input_ids[row, :end], targets[row, :end] = ids[:-1], ids[1:]
        mask[row, max(0, end - len(continuation)) : end] = True
    return MicroBatch(
        input_ids_BT=torch.from_numpy(input_ids),
        position_ids_BT=torch.arange(T).expand(len(pairs), T).contiguous(),
        targets_BT=torch.from_numpy(targets),
        loss_mask_BT=torch.from_numpy(mask),
        sample_ids_B=torch.from_numpy(np.asarray(sample_ids, dtype=np.int64)),
    )
