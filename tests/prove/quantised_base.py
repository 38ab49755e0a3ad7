"""What a frozen base in few bits adds to a process: `python -m tests.prove.quantised_base RECIPE`.

Resident memory after a stage's model is loaded, less that before, less its parameters (embeddings,
norms, the adapter) and their optimizer states, over the number of quantised weights. The first
model is loaded for what it imports; the second is measured.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import tempfile
from pathlib import Path

import torch

from shardwise.adapters.quantise import quantised
from shardwise.config.load import load_config
from shardwise.data.tokenizer import load_tokenizer
from shardwise.metrics.meters import GB, memory_metrics
from shardwise.metrics.writers import MetricsLogger
from shardwise.parallel.mesh import init_distributed
from shardwise.stages.base import StageContext
from shardwise.stages.run import with_vocabulary


def resident() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was given back to the allocator is no model's
    return memory_metrics()["rss_gb"] * GB


def bytes_a_weight(recipe: str) -> float:
    run = load_config(recipe).config
    tokenizer = load_tokenizer(run.tokenizer)
    run = with_vocabulary(run, tokenizer)
    init_distributed(torch.device("cpu"), 600.0)
    with tempfile.TemporaryDirectory() as folder:
        logger = MetricsLogger(Path(folder), rank=1)
        ctx = StageContext(run, run.stages[0], tokenizer, Path(folder), logger, None, {})
        engines = []
        for _ in range(2):
            before = resident()
            engines.append(ctx.engine(ctx.stage.optimizer))
            ctx.load_initial_weights(engines[-1])
            grown = resident() - before
    model, state = engines[-1].model, engines[-1].state_dict().tensors
    others = [*model.parameters(), *(t for n, t in state.items() if n.startswith("optim."))]
    weights = sum(math.prod(w.shape) for _, w in quantised(model))
    return (grown - sum(t.numel() * t.element_size() for t in others)) / weights


if __name__ == "__main__":
    print(bytes_a_weight(sys.argv[1]))
