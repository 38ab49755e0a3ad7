"""What generation occupies on a rank: whole weights, and keys and values of the rows in flight."""

from __future__ import annotations

import dataclasses

from shardwise.memory.parameters import held, used_kv_width
from shardwise.memory.shapes import ModelShape, Part, Place, Work

PAGE = 16  # tokens; see `rollout.cache`


def served_weights(model: ModelShape, work: Work, tp: int = 1) -> int:
    """In the compute dtype, an adapter merged, cut among ``tp`` ranks.

    Of whole ones, a CPU has another copy, packed (`rollout.native`).
    """
    plain = dataclasses.replace(model, adapted=None)
    copies = 2 if work.device == "cpu" and tp == 1 else 1
    return copies * work.compute_bytes * held(plain, Place((Part(model.num_layers),), tp=tp))


def cache(
    model: ModelShape,
    work: Work,
    rows: int,
    length: int,
    tp: int = 1,
    max_tokens: int | None = None,
) -> int:
    """Keys and values of ``rows`` sequences of ``length`` tokens (Pope et al. 2022, section 3).

    In whole pages, as if no sequence shared any with another, of the heads that one of ``tp`` ranks
    has. ``max_tokens``: no more are cached.
    """
    tokens = rows * -(-length // PAGE) * PAGE
    if max_tokens is not None:
        tokens = min(tokens, max_tokens // PAGE * PAGE)
    width = used_kv_width(model, Place((Part(model.num_layers),), tp=tp))
    return 2 * model.num_layers * tokens * width * work.compute_bytes
