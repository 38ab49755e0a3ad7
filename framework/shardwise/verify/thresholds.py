"""Sizes at which the code takes another way, made small enough for a small recipe to meet them.

A tensor that is read in blocks, a vocabulary that is treated in chunks: whatever a constant decides
would be met by the large recipe alone. `lowered` sets each to a value that small tensors exceed, in
a rank of a layout. One process keeps them as they are, so what differs is found. Of some, numbers
are a function: of the blocks that share a scale or a generator. Those are lowered on both sides.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_PACKAGE = __package__.partition(".")[0]
Table = Mapping[tuple[str, str], Any]  # by module and name
OF_BOTH: Table = {
    ("models.common.init", "_BLOCK_ELEMENTS"): 1 << 12,
    ("ops.nf4", "NESTED_BLOCK"): 8,
    ("optim.blockwise", "BLOCK"): 32,
    ("optim.blockwise", "LEAST"): 1 << 7,
    # The oracle's own.
    ("engines.plain_quantised", "NESTED_BLOCK"): 8,
    ("engines.plain_optimizers", "BLOCK"): 32,
    ("engines.plain_optimizers", "LEAST"): 1 << 7,
}
# Where no adapter is trained, whose factors are smaller: so that some of a model's matrices are
# beyond it as a whole, and a rank's part of them is not.
OF_MODELS: Table = {
    ("optim.blockwise", "LEAST"): 1 << 10,
    ("engines.plain_optimizers", "LEAST"): 1 << 10,
}
# Bytes are multiples of a number's eight.
OF_CHECKPOINTS: Table = {
    ("checkpoint.manifest", "BLOCK_BYTES"): 3 << 11,
    ("checkpoint.files", "HASH_BYTES"): 1 << 11,
    ("checkpoint.writer", "WRITE_BACK_BYTES"): 1 << 12,
    ("checkpoint.saving", "MAX_SHARD_BYTES"): 1 << 17,
    ("checkpoint.loading", "READ_BYTES"): 1 << 13,
    ("checkpoint.loading", "MAX_OPEN_FILES"): 2,
}
OF_UPDATES: Table = {
    ("ops.cross_entropy", "_CPU_CHUNK_ELEMENTS"): 1 << 12,
    ("rollout.backends", "MAX_PREFILL_TOKENS"): 32,
    ("memory.serving", "PAGE"): 4,
    # A device shards block by block where a CPU takes the model as one.
    ("parallel.data", "SHARDED_WHOLE"): frozenset(),
    # Layers of blocks that are to be compiled take other ways, which a trace only follows.
    ("parallel.blocks", "compiled"): lambda forward, breaks: forward,
}


@contextlib.contextmanager
def lowered(*tables: Table) -> Iterator[None]:
    """All of these tables until the block ends."""
    values = dict(itertools.chain(*(table.items() for table in tables)))
    homes = {key: importlib.import_module(f"{_PACKAGE}.{key[0]}") for key in values}
    ours = [vars(m) for name, m in list(sys.modules.items()) if name.startswith(f"{_PACKAGE}.")]
    with contextlib.ExitStack() as undo:
        for (module, name), value in values.items():
            before = getattr(homes[module, name], name)
            for held in ours:  # who imported the value holds it, too
                if held.get(name) is before:
                    undo.callback(held.__setitem__, name, before)
                    held[name] = value
        yield
