"""What a stage is given and what it must offer. Everything else is the loop's business."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from shardwise.config.schema import EngineConfig, OptimizerConfig, RunConfig
from shardwise.data.batch import MicroBatch
from shardwise.data.tokenizer import Tokenizer
from shardwise.engines.base import Engine
from shardwise.engines.native import NativeEngine
from shardwise.metrics.writers import MetricsLogger
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import Mesh, build_mesh, pick_device
from shardwise.stages.start import load_start


@dataclasses.dataclass(frozen=True)
class StageContext:
    """The run around one stage."""

    run: RunConfig
    stage: Any  # the stage's own config class
    tokenizer: Tokenizer
    directory: Path  # of the run
    mesh: Mesh
    logger: MetricsLogger
    parent: Path | None  # the checkpoint that the stage starts from

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return dist.get_rank() == 0

    @property
    def cache(self) -> Path:
        """Where tokenised data lives between runs of the same directory."""
        return self.directory / "cache"

    def engine(self, optimizer: OptimizerConfig | None) -> Engine:
        """A model of the run's family under this stage's layout."""
        config: EngineConfig = self.stage.engine
        return NativeEngine(
            self.run.model,
            config,
            self.mesh,
            seed=self.run.seed,
            stage=self.stage.name,
            optimizer=optimizer,
        )

    def load_start(self, engine: Engine) -> None:
        """Fill the weights that this stage starts from: its parent's, or the run's start."""
        load_start(engine, self.run, self.parent)


class Stage(Protocol):
    """One kind of training. Registered in `stages.registry` beside its config class."""

    engine: Engine
    data_hash: str

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Consume the samples of ``step`` (a pure function of it), update, return metrics.

        ``tokens`` (over all ranks), ``loss`` and ``grad_norm`` are expected among them.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Metrics on data that is not trained on; ``val_loss`` decides which is best."""
        ...


def stage_mesh(config: EngineConfig, world_size: int) -> Mesh:
    """The mesh of a stage's layout. The world's process group must exist."""
    return build_mesh(parse_layout(config.layout, world_size), pick_device(config.device))


def rank_share(size: int, engine: Engine) -> tuple[np.ndarray, int]:
    """This rank's contiguous share of ``size`` items (indices), and how many of them are real.

    All ranks get the same number, so that their collectives match; where ``size`` does not
    divide, the last item repeats and must not carry loss.
    """
    share = -(-size // engine.data_size)
    mine = np.arange(engine.data_rank * share, (engine.data_rank + 1) * share)
    return np.minimum(mine, size - 1), int(np.clip(size - mine[0], 0, share))


def micro_batches(batch: MicroBatch, real_rows: int, micro_batch: int) -> list[MicroBatch]:
    """Cut a rank's rows into micro-batches; rows after ``real_rows`` lose their loss mask."""
    if real_rows < batch.input_ids_BT.shape[0]:
        mask = batch.loss_mask_BT.clone()
        mask[real_rows:] = False
        batch = dataclasses.replace(batch, loss_mask_BT=mask)
    return batch.split(micro_batch)


def mean_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The plain mean of each metric over those updates of one step that have it."""
    names = dict.fromkeys(n for row in rows for n in row)
    found = {n: [row[n] for row in rows if n in row] for n in names}
    return {n: sum(values) / len(values) for n, values in found.items()}
