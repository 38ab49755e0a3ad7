"""Evaluation: validation bits per byte, beside what gzip -9 and xz need for the same files."""

from __future__ import annotations

import math
from typing import Any

from shardwise.data.compression import compressed_bits_per_byte
from shardwise.data.datasets import build_validation
from shardwise.data.packing import SlidingRows
from shardwise.engines.base import Engine
from shardwise.errors import ConfigError
from shardwise.stages.base import StageContext
from shardwise.stages.evaluation_configs import BitsConfig
from shardwise.stages.supervised import sum_nll


def evaluate(config: BitsConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """``val_bits_per_byte``, ``gzip_bits_per_byte``, ``xz_bits_per_byte`` and what they rest on.

    Each document's end token is paid for, as a compressor pays for its frame.
    """
    validation = build_validation(config.data, ctx.tokenizer, config.seq_len, ctx.cache)
    if validation is None:
        raise ConfigError(f"evaluation {config.name}: data names no validation documents")
    rows = SlidingRows(validation.rows, config.stride or config.seq_len)
    nll, tokens = sum_nll(engine, rows, rows.num_rows, config.micro_batch)
    result: dict[str, Any] = {
        "val_bits_per_byte": nll / math.log(2) / validation.num_bytes,
        "val_bytes": validation.num_bytes,
        "val_tokens": tokens,
        "val_documents": validation.num_documents,
    }
    if ctx.is_main:
        bars = compressed_bits_per_byte(d.raw for d in validation.documents())
        result |= {f"{name}_bits_per_byte": value for name, value in bars.items()}
    return result
