"""Evaluation: validation bits per byte, beside what gzip -9 and xz need for the same files."""

from __future__ import annotations

import math
from typing import Any

from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
from shardwise.data.compression import compressed_bits_per_byte
from shardwise.data.config import DataConfig
from shardwise.data.datasets import build_validation
from shardwise.data.packing import SlidingRows
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.stages.base import StageContext
from shardwise.stages.evaluation_configs import BitsConfig
from shardwise.stages.supervised import sum_nll


def data_of(config: BitsConfig, run: RunConfig, stage: StageConfig) -> DataConfig:
    """The documents that are measured after ``stage``.

    The evaluation's own; else the stage's; else, where that has conversations or problems, those
    of the run's first stage with documents; the standard library's where there is none. Raises
    ConfigError when nothing of them is kept for validation.
    """
    found = [config.data, *(getattr(s, "data", None) for s in (stage, *run.training))]
    data = next((d for d in found if isinstance(d, DataConfig)), DataConfig())
    if not data.validation_sources():
        raise ConfigError(
            f"evaluation {config.name} after stage {stage.name}: the data name no validation "
            "documents; set held_out or validation there, or give the evaluation data of its own"
        )
    return data


def source_of(data: DataConfig) -> str:
    """What the validation documents are, in words."""
    labels = ", ".join(s.label for s in data.validation_sources())
    return f"{data.held_out:.3g} of {labels}" if data.held_out else labels


def evaluate(config: BitsConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """``val_bits_per_byte``, ``gzip_bits_per_byte``, ``xz_bits_per_byte`` and what they rest on
    (``val_source``: see `data_of`).

    Each document's end token is paid for, as a compressor pays for its frame.
    """
    data = data_of(config, ctx.run, ctx.stage)
    validation = build_validation(data, ctx.tokenizer, config.seq_len, ctx.cache)
    assert validation is not None
    rows = SlidingRows(validation.rows, config.stride or config.seq_len)
    nll, tokens = sum_nll(engine, rows, rows.num_rows, config.micro_batch)
    result: dict[str, Any] = {
        "val_bits_per_byte": nll / math.log(2) / validation.num_bytes,
        "val_source": source_of(data),
        "val_bytes": validation.num_bytes,
        "val_tokens": tokens,
        "val_documents": validation.num_documents,
    }
    if ctx.is_main:
        bars = compressed_bits_per_byte(d.raw for d in validation.documents())
        result |= {f"{name}_bits_per_byte": value for name, value in bars.items()}
    return result
