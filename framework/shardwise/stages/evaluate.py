"""`shardwise.evaluate`: the figures of a run, again, from a checkpoint alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardwise import checkpoint
from shardwise.checkpoint.convert import open_model
from shardwise.config.load import load_config
from shardwise.config.yaml12 import parse
from shardwise.data.tokenizer import load_tokenizer
from shardwise.errors import CheckpointError
from shardwise.metrics.progress import Progress
from shardwise.metrics.writers import MetricsLogger
from shardwise.models import travel
from shardwise.parallel.mesh import init_distributed, pick_device
from shardwise.rollout.api import served
from shardwise.stages.base import StageContext
from shardwise.stages.pipeline import evaluate_all
from shardwise.stages.run import with_vocabulary


def evaluate(ckpt: str | Path, adapters: Mapping[str, str | Path] | None = None) -> dict[str, Any]:
    """Run every evaluation of the recipe that a checkpoint carries, on its weights.

    ``adapters``, by a name of your choice, are folders of PEFT's: each is measured over the one
    base in ``ckpt``, and the figures come by name.

    ``ckpt``: a checkpoint, or a folder of them (its latest). Recipe and tokenizer come from the
    checkpoint; documents and problems from where the recipe says. The layout is data parallel
    over the ranks at hand. Raises CheckpointError for a checkpoint that carries no recipe or no
    evaluations.
    """
    path = checkpoint.resolve(Path(ckpt))
    files = checkpoint.read_files(path)
    if "config.yaml" not in files:
        raise CheckpointError(f"{path}: carries no config.yaml; it was not saved by a stage")
    with tempfile.TemporaryDirectory() as folder:
        travel.write(Path(folder), files)
        run = load_config(parse(files["config.yaml"].decode(), f"{path}/config.yaml").data).config
        if not run.evaluations:
            raise CheckpointError(f"{path}: its recipe has no evaluations; add some and retrain")
        tokenizer = load_tokenizer(Path(folder))
        run = with_vocabulary(run, tokenizer)
        name = json.loads(files["stage.json"])["stage"]
        stage = next(s for s in run.stages if s.name == name)
        engine_config = stage.engine.model_copy(update={"layout": "auto"})
        stage = stage.model_copy(update={"engine": engine_config})
        if stage.adapter is not None:
            adapter = stage.adapter.model_copy(update={"start": "parent"})
            stage = stage.model_copy(update={"adapter": adapter})
        if hasattr(stage, "roles"):
            stage = stage.model_copy(update={"roles": type(stage.roles)()})
        init_distributed(pick_device(stage.engine.device), stage.engine.timeout_s)
        rank = dist.get_rank()
        with Progress([], rank=rank) as progress:
            logger = MetricsLogger(Path(folder), rank=1)  # no rank writes metrics
            ctx = StageContext(run, stage, tokenizer, Path(folder), logger, path)
            engine = ctx.engine(None)
            if not adapters:
                ctx.load_initial_weights(engine)
                return evaluate_all(ctx, engine, progress)
            found = {}
            for own, weights in served(run.model, open_model(path), adapters):
                engine.load_weights(weights)
                found[str(own)] = evaluate_all(ctx, engine, progress)
            return found
