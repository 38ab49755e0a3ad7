"""Figures of a model, from a checkpoint or a folder alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardwise import checkpoint
from shardwise.checkpoint.convert import RUN_FILE, STAGE_FILE, open_model
from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
from shardwise.config.start import located
from shardwise.config.yaml12 import parse
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import UserError
from shardwise.metrics.progress import Progress
from shardwise.metrics.writers import MetricsLogger
from shardwise.models import travel
from shardwise.parallel.mesh import init_distributed, pick_device
from shardwise.rollout.api import served
from shardwise.rollout.config import RolloutConfig
from shardwise.stages.base import StageContext
from shardwise.stages.initial_weights import is_native
from shardwise.stages.pipeline import evaluate_all
from shardwise.stages.run import check_evaluations, with_vocabulary
from shardwise.stages.served import check_served

_SAY = "say what to measure (--bits-per-byte, --problems, --multiple-choice, --lm-eval)"


def evaluate(
    ckpt: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    precision: str | None = None,
    tp: int = 1,
) -> dict[str, Any]:
    """Run ``evaluations`` (as a recipe has them) on a model's weights; flat figures.

    ``ckpt``: a checkpoint or a folder of them (its latest), a Hugging Face or PEFT folder, a GGUF
    file, or ``hf:org/name``. Without ``evaluations``: those of the recipe that a run's checkpoint
    carries, whose tokenizer comes with it; documents and problems from where the recipe says.
    ``adapters``, by a name of your choice, are folders of PEFT's: each is measured over the one
    base in ``ckpt``, and the figures come by name. ``precision``: fp32 or bf16; None: the recipe's,
    else fp32. ``tp``: of the ranks at hand, as many neighbours share a model, and the others are
    data parallel. Raises UserError when it is not said what to measure, and for what cannot be.
    """
    path = located(ckpt)
    with tempfile.TemporaryDirectory() as folder:
        if is_native(path) and RUN_FILE in checkpoint.read_files(path := checkpoint.resolve(path)):
            run, stage, tokenizer = _of_run(path, Path(folder), evaluations)
            parent: Path | None = path
        else:
            run, stage, tokenizer = _of_folder(ckpt, evaluations)
            parent = None
        check_evaluations(run)
        said = {} if precision is None else {"precision": precision}
        init_distributed(pick_device(stage.engine.device), stage.engine.timeout_s)
        engine_config = stage.engine.model_copy(update={"layout": _layout(tp), **said})
        shared: dict[str, Any] = {"rollout": RolloutConfig(tp=tp)}
        generated = shared if hasattr(stage, "rollout") else {}
        stage = stage.model_copy(update={"engine": engine_config, **generated})
        measured = [
            e.model_copy(update=shared) if hasattr(e, "rollout") else e for e in run.evaluations
        ]
        run = run.model_copy(update={"evaluations": measured})
        check_served(run, stage, dist.get_world_size())
        rank = dist.get_rank()
        with Progress([], rank=rank) as progress:
            logger = MetricsLogger(Path(folder), rank=1)  # no rank writes metrics
            ctx = StageContext(run, stage, tokenizer, Path(folder), logger, parent)
            engine = ctx.engine(None)
            if not adapters:
                ctx.load_initial_weights(engine)
                return evaluate_all(ctx, engine, progress)
            found = {}
            for own, weights in served(run.model, open_model(path), adapters):
                engine.load_weights(weights)
                found[str(own)] = evaluate_all(ctx, engine, progress)
            return found


def _layout(tp: int) -> str:
    """Of the ranks at hand."""
    world = dist.get_world_size()
    if world % tp:
        raise UserError(f"--tp {tp}: it does not divide the {world} ranks at hand")
    if tp == 1:
        return "auto"
    return f"tp{tp}" if tp == world else f"dp{world // tp}.zero3.tp{tp}"


def _of_run(
    path: Path, folder: Path, evaluations: Sequence[Mapping[str, Any]]
) -> tuple[RunConfig, StageConfig, Tokenizer]:
    """The recipe that a checkpoint carries, and the stage that wrote it."""
    files = checkpoint.read_files(path)
    travel.write(folder, files)
    recipe = parse(files[RUN_FILE].decode(), f"{path}/{RUN_FILE}").data
    if evaluations:
        recipe["evaluations"] = list(evaluations)
    run = load_config(recipe).config
    if not run.evaluations:
        raise UserError(f"{path}: its recipe has no evaluations; {_SAY}")
    tokenizer = load_tokenizer(folder)
    run = with_vocabulary(run, tokenizer)
    name = json.loads(files[STAGE_FILE])["stage"]
    stage = next(s for s in run.training if s.name == name)
    if stage.head != "vocabulary":
        raise UserError(f"{path}: its model gives scores, no text; its stage's validation is all")
    if stage.adapter is not None:
        adapter = stage.adapter.model_copy(update={"start": "parent"})
        stage = stage.model_copy(update={"adapter": adapter})
    if hasattr(stage, "roles"):
        stage = stage.model_copy(update={"roles": type(stage.roles)()})
    return run, stage, tokenizer


def _of_folder(
    ckpt: str | Path, evaluations: Sequence[Mapping[str, Any]]
) -> tuple[RunConfig, StageConfig, Tokenizer]:
    """A run that starts from a model and trains nothing."""
    if not evaluations:
        raise UserError(f"{ckpt}: carries no recipe with evaluations; {_SAY}")
    recipe = {
        "init_from": str(ckpt),
        "engine": {"compile": False},
        "stages": [{"kind": "pretrain", "name": "model", "steps": 1}],
        "evaluations": list(evaluations),
    }
    run = load_config(recipe).config
    tokenizer = load_tokenizer(run.tokenizer)
    return with_vocabulary(run, tokenizer), run.training[0], tokenizer
