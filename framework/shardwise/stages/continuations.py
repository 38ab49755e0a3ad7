"""Evaluation: how the model goes on from given texts. Not a figure; something to read."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.engines.base import Engine
from shardwise.ops import rng
from shardwise.rollout.sequences import Request
from shardwise.stages.base import StageContext
from shardwise.stages.evaluation_configs import ContinuationsConfig
from shardwise.stages.served import serve


def evaluate(config: ContinuationsConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """``samples``: prompt and completion by this stage. Every rank must call it."""
    tokenizer = ctx.tokenizer
    served = serve(ctx, torch.float32, said=config.rollout)
    served.generator.update_weights(engine.weights())
    if served.group:
        return {"samples": []}
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    requests = [Request(i, [start, *tokenizer.encode(p)]) for i, p in enumerate(config.prompts)]
    sampling = config.sampling.stopping_at(tokenizer.stop_ids)
    key = rng.key(ctx.run.seed, "continuations", config.name)
    found = served.generator.generate(requests, sampling, key)
    return {
        "samples": [
            {"stage": ctx.stage.name, "prompt": p, "completion": tokenizer.decode(c.token_ids)}
            for p, c in zip(config.prompts, found, strict=True)
        ]
    }
