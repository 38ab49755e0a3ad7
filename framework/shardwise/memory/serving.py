"""What generation occupies on a rank: whole weights, and keys and values of the rows in flight."""

from __future__ import annotations

import dataclasses

from shardwise.memory.parameters import held
from shardwise.memory.shapes import ModelShape, Part, Place, Work

PAGE = 16  # tokens; see `rollout.cache`


def served_weights(model: ModelShape, work: Work) -> int:
    """Whole in the compute dtype, an adapter merged; on a CPU, packed beside (`rollout.native`)."""
    plain = dataclasses.replace(model, adapted=None)
    copies = 2 if work.device == "cpu" else 1
    return copies * work.compute_bytes * held(plain, Place((Part(model.num_layers),)))


def cache(model: ModelShape, work: Work, rows: int, length: int) -> int:
    """Keys and values of ``rows`` sequences of ``length`` tokens (Pope et al. 2022, section 3).

    In whole pages, as if no sequence shared any with another.
    """
    length = -(-length // PAGE) * PAGE
    width = model.num_kv_heads * model.head_width
    return 2 * model.num_layers * rows * length * width * work.compute_bytes
