"""Numbers as large and trained models have them, which a small fresh one has not.

Its scores lie around zero, and its text holds a few of the words. So the whole path ends with a
pass over rows that hold every word of the vocabulary, in and out, with weights that send scores
and logits far away. The largest logit of a token lies beyond what fp64 has an exponential of,
above or below; where the head is the embedding, below. In fp64, so that it can be compared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.contract import Loss, LossOutput
from shardwise.losses.logprobs import valid_logprobs
from shardwise.models.common.config import DecoderConfig
from shardwise.ops.logits import selected_values

# Shape suffixes: R rows, T tokens, D model width.

SEED = 2
MOST_TOKENS = 32  # of a row: two documents
PIECES = 8  # of a row, at whose borders documents begin: those of ranks' tokens are among them
SCORE = 5.0  # standard deviation of a query's and a key's features
WORD = 0.5  # a word's own share of its embedding, beside the common direction
LOGIT = 4000.0  # of a token whose activations are the common direction
FIRST_SAMPLE = 1 << 20  # no sample of the stage has such a number


def meet(
    engine: Engine, model: DecoderConfig, count: int
) -> tuple[list[MicroBatch], Loss, list[tuple[int, Tensor]]]:
    """Give the engine such weights, for good, and read ``count`` micro-batches a data rank.

    Returns them, their loss, and by row what the model says of this rank's tokens. Collective.
    """
    engine.load_weights(extreme_weights(engine, model))
    batches = extreme_batches(engine, model, count)
    found = engine.forward(batches, functools.partial(_read, model))
    loss: Loss = _Squares() if model.head == "scalar" else CausalLM()
    return batches, loss, list(_rows(batches, found))


def extreme_weights(engine: Engine, model: DecoderConfig) -> list[tuple[str, Tensor]]:
    """Those of the engine that are to be replaced, full; a collective call.

    Embeddings share a direction, with which the final norm and the head send all logits of a token
    the same way; words of odd numbers the other way, unless the head is the embedding.
    """
    width = model.hidden_size
    common_D = torch.randn(width, generator=torch.Generator().manual_seed(SEED)).double()
    far, found = LOGIT / width, []
    for name, value in engine.full("weights"):
        end = name.split(".", 2)[-1] if name.startswith("layers.") else name
        if end in ("attn.q.weight", "attn.k.weight"):
            new = SCORE / width**0.5 * _unit(value)
        elif end in ("attn.q_norm.weight", "attn.k_norm.weight"):
            new = SCORE * value
        elif end == "norm.weight":
            new = -far * value
        elif end == "embed.weight":
            sign_V = torch.ones(len(value))
            if not model.tie_embeddings:
                sign_V[1::2] = -1
            new = WORD * _unit(value) + sign_V[:, None].to(value) * common_D.to(value)
        elif end == "head.weight":
            new = _unit(value) / far + common_D.to(value) / 2
        else:
            continue
        found.append((name, new))
    return found


def _unit(value: Tensor) -> Tensor:
    """Divided by its root mean square."""
    return value / value.square().mean().sqrt().clamp(min=1e-30)


def extreme_batches(engine: Engine, model: DecoderConfig, count: int) -> list[MicroBatch]:
    """This rank's ``count`` micro-batches of rows in which every word stands, and is a target.

    On all ranks together the same rows, and others behind them without a valid token; none on a
    rank that is outside of the engine.
    """
    if engine.data_rank < 0:
        return []
    words, count = model.vocab_size, max(count, 1)
    num_tokens = min(MOST_TOKENS, model.max_seq_len)
    needed = -(-words // num_tokens)
    parts = count * engine.data_size
    rows = -(-needed // parts) * parts
    noise = torch.Generator().manual_seed(SEED)

    def each_once() -> Tensor:
        padded = torch.zeros(rows * num_tokens, dtype=torch.int64)
        padded[:words] = torch.randperm(words, generator=noise)
        return padded.view(rows, num_tokens)

    index_T = torch.arange(num_tokens)
    # In rows side by side elsewhere, so that one sees nothing of what another sees.
    first_R1 = (1 + torch.arange(rows)[:, None] % (PIECES - 1)) * num_tokens // PIECES
    whole = MicroBatch(
        input_ids_BT=each_once(),
        position_ids_BT=torch.where(index_T < first_R1, index_T, index_T - first_R1),
        targets_BT=each_once(),
        loss_mask_BT=(torch.arange(rows * num_tokens) < words).view(rows, num_tokens),
        sample_ids_B=FIRST_SAMPLE + torch.arange(rows),
        segment_ids_BT=(index_T >= first_R1).long(),
    )
    return whole.split(rows // parts)[engine.data_rank :: engine.data_size]


def _read(model: DecoderConfig, outputs: Any, batch: MicroBatch) -> Tensor:
    """What a model says of a micro-batch's valid targets [B, T]: log-probabilities, or values."""
    if model.head == "scalar":
        return selected_values(outputs, batch.loss_mask_BT)
    return valid_logprobs(outputs, batch)


class _Squares:
    """Of a scalar head's values."""

    weights: Mapping[str, float] = {"loss": 1.0}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        """The valid tokens."""
        return {"loss": batch.loss_mask_BT.sum(dtype=torch.float64)}

    def __call__(self, logits_BTV: Any, batch: MicroBatch) -> LossOutput:
        """Their sum."""
        return LossOutput({"loss": selected_values(logits_BTV, batch.loss_mask_BT).square().sum()})


def _rows(batches: Sequence[MicroBatch], found: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Of rows with a valid token, the sample's number and what was found of it."""
    for batch, values in zip(batches, found, strict=True):
        for row, valid_T in enumerate(batch.loss_mask_BT):
            if bool(valid_T.any()):
                yield int(batch.sample_ids_B[row]) - FIRST_SAMPLE, values[row]
