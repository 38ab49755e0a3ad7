"""What pre-training and fine-tuning share: rows of a dataset, the causal loss, one update."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from shardwise.config.schema import StageConfig
from shardwise.data.batch import MicroBatch
from shardwise.data.packing import Row, collate
from shardwise.engines.base import Engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.optim.schedules import consumed_before, global_batch_at
from shardwise.stages.base import Stage, StageContext, data_shard, micro_batches


class Rows(Protocol):
    """A dataset as the supervised stages see it."""

    @property
    def num_rows(self) -> int: ...

    def row(self, index: int) -> Row:
        """One row of ``seq_len`` pairs."""
        ...


class TrainingRows(Rows, Protocol):
    """Rows that are counted without being read."""

    def num_pairs(self, index: int) -> int:
        """Tokens of a row, padding left out."""
        ...


class Order(Protocol):
    """The endless stream of row indices."""

    def batch(self, position: int, size: int) -> np.ndarray:
        """Row indices at the stream's positions ``position`` and after."""
        ...


@dataclasses.dataclass(frozen=True)
class ChosenRows:
    """Rows of a dataset as `stages.data_shards` takes them; each is one branch."""

    data: Rows
    indices: Sequence[int]
    row_ids: Sequence[int]
    packed: bool

    def __len__(self) -> int:
        return len(self.indices)

    def sizes(self, row: int) -> list[int]:
        """Valid tokens of a row."""
        return [int(self.data.row(self.indices[row]).loss_mask.sum())]

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """See `data_shards.Rows`."""
        some = [self.data.row(self.indices[i]) for i in rows]
        batch = collate(some, [self.row_ids[i] for i in rows], self.packed)
        [batch] = micro_batches(batch, num_real, len(rows))
        return batch


class SupervisedStage(Stage):
    """Next-token training over a dataset of rows. Subclasses say which dataset."""

    # Whether rows hold several documents: said once, so that all steps compile to one graph.
    packed = True

    def __init__(
        self,
        ctx: StageContext,
        train: TrainingRows,
        order: Order,
        validation: Rows | None,
        data_hash: str,
    ) -> None:
        self.config: StageConfig = ctx.stage
        self.train, self.order, self.validation = train, order, validation
        self.data_hash = data_hash
        self.engine: Engine = ctx.engine(self.config.optimizer)
        self.loss = CausalLM()

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """One update on the samples of ``step``."""
        batch = self.config.batch
        position, size = consumed_before(batch, step), global_batch_at(batch, step)
        indices = self.order.batch(position, size)
        mine, real = data_shard(size, self.engine)
        rows = collate(
            [self.train.row(int(i)) for i in indices[mine]], position + mine, self.packed
        )
        metrics = self.engine.forward_backward(
            micro_batches(rows, real, batch.micro_batch), self.loss, lr
        )
        return metrics | {
            "grad_norm": self.engine.step(lr),
            "tokens": float(sum(self.train.num_pairs(int(i)) for i in indices)),
            "samples": float(position + size),
        }

    def validate(self) -> dict[str, float]:
        """Mean loss over the validation rows (all, or the first ``max_batches`` batches)."""
        if self.validation is None:
            return {}
        batch, limit = self.config.batch, self.config.validation.max_batches
        micro = batch.micro_batch
        total = min(self.validation.num_rows, limit * batch.global_batch or 1 << 62)
        nll, tokens = sum_nll(self.engine, self.validation, total, micro, self.packed)
        return {"val_loss": nll / tokens, "val_tokens": tokens} if tokens else {}


def sum_nll(
    engine: Engine, rows: Rows, num_rows: int, micro: int, packed: bool = True
) -> tuple[float, float]:
    """(negative log-likelihood in nats, valid tokens) of the first rows, over all data ranks."""
    sums = np.zeros(2)
    chunk = micro * engine.data_size
    for start in range(0, num_rows, chunk):
        mine, real = data_shard(min(chunk, num_rows - start), engine)
        if not len(mine):
            continue
        batch = collate([rows.row(int(i)) for i in start + mine], start + mine, packed)
        [batch] = micro_batches(batch, real, micro)
        [logp_BT] = engine.forward([batch], valid_logprobs)
        sums += [-float(logp_BT.sum(dtype=torch.float64)), float(batch.loss_mask_BT.sum())]
    nll, tokens = engine.sum_over_data(sums.tolist())
    return nll, tokens
