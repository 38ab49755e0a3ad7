"""Sizes at which the code takes another way, made small enough for a small recipe to meet them.

A tensor that is read in blocks, a vocabulary that is treated in chunks: whatever a constant decides
would be met by the large recipe alone. `lowered` sets each to a value that small tensors exceed, in
a rank of a layout. One process keeps them as they are, so what differs is found.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

_PACKAGE = __package__.partition(".")[0]
# By module and name. Bytes are multiples of a number's eight.
OF_CHECKPOINTS: dict[tuple[str, str], Any] = {
    ("checkpoint.manifest", "BLOCK_BYTES"): 3 << 11,
    ("checkpoint.files", "HASH_BYTES"): 1 << 10,
    ("checkpoint.writer", "WRITE_BACK_BYTES"): 1 << 12,
    ("checkpoint.saving", "MAX_SHARD_BYTES"): 1 << 17,
    ("checkpoint.loading", "READ_BYTES"): 1 << 13,
    ("checkpoint.loading", "MAX_OPEN_FILES"): 2,
}
OF_UPDATES: dict[tuple[str, str], Any] = {
    ("ops.cross_entropy", "_CPU_CHUNK_ELEMENTS"): 1 << 12,
    ("rollout.scheduler", "MAX_PREFILL_TOKENS"): 32,
    # A device shards block by block where a CPU takes the model as one.
    ("parallel.data", "SHARDED_WHOLE"): frozenset(),
    # Layers of blocks that are to be compiled take other ways, which a trace only follows.
    ("parallel.blocks", "compiled"): lambda forward, breaks: forward,
}


@contextlib.contextmanager
def lowered(*, updates: bool) -> Iterator[None]:
    """Those of checkpoints, and with ``updates`` of what computes, until the block ends."""
    with contextlib.ExitStack() as undo:
        for (module, name), value in (OF_CHECKPOINTS | (OF_UPDATES if updates else {})).items():
            before = getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name)
            for other in list(sys.modules.values()):  # who imported the value holds it, too
                if other.__name__.split(".")[0] == _PACKAGE and vars(other).get(name) is before:
                    undo.callback(setattr, other, name, before)
                    setattr(other, name, value)
        yield
