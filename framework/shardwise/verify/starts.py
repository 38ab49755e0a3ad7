"""What a stage may start from, read onto a layout: checkpoints, a folder, an adapter.

One process writes them, other numbers than the initial weights, and reads them too. Every stage
starts from its initial weights all the same; these are read, noted and taken off again.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shardwise import checkpoint
from shardwise.checkpoint import adapted
from shardwise.checkpoint.convert import MODEL_FILE, convert
from shardwise.engines.base import Engine
from shardwise.errors import CheckpointError, ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.stages.initial_weights import check_initial_weights

SEED = 1
APART = 0.1  # from initial weights: those of a norm are all alike


@dataclasses.dataclass(frozen=True)
class Start:
    """``name``: in words. ``parent``: an adapter goes on from the one that lies there."""

    name: str
    path: Path
    parent: bool = False


def write_models(folder: Path, model: DecoderConfig, dtype: torch.dtype) -> None:
    """A language model as a checkpoint and as a Hugging Face folder, and one with a scalar head.

    Checkpoints have the ``dtype`` of masters, their values those of fp32. In one process.
    """
    for name, config in (("words", model), ("scores", model.as_scalar())):
        named = adapted.initial_tensors(config, SEED)
        files = {MODEL_FILE: config.model_dump_json().encode()}
        checkpoint.save(folder / name, 0, dict(_apart(named, dtype)), {}, files)
    made = folder / "folder"
    try:  # transformers has no class for every model, and no key for all of one
        convert(folder / "words", made, "hf", "fp32")
        check_initial_weights(made, model)
    except (CheckpointError, ConfigError):
        shutil.rmtree(made, ignore_errors=True)


def write_adapter(folder: Path, model: DecoderConfig, engine: Engine) -> None:
    """A checkpoint of what ``engine`` trains beside the model, on the base of `write_models`."""
    config, root = engine.adapter_config, folder / "adapter"
    assert config is not None
    named = ((name.removeprefix("model."), t) for name, t in engine.state_dict().tensors.items())
    trained = [(name, t) for name, t in named if not name.startswith("optim.")]
    files = {
        MODEL_FILE: model.model_dump_json().encode(),
        adapted.ADAPTER_FILE: adapted.description(config, folder / "words", 0, root),
    }
    checkpoint.save(root, 0, dict(_apart(iter(trained), trained[0][1].dtype)), {}, files)


def _apart(named: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    noise = torch.Generator().manual_seed(SEED)
    for name, value in named:
        moved = value.float() + APART * torch.randn(value.shape, generator=noise)
        yield f"model.{name}", moved.to(dtype)


def starts_of(folder: Path, role: str, model: DecoderConfig, engine: Engine) -> list[Start]:
    """What a role's engine can start from; ``model``: its own."""
    found = [Start("a checkpoint", folder / "words")]
    if (named := folder / "folder").exists():
        found.append(Start("a folder", named))
    if model.head == "scalar":
        scored = [Start("a checkpoint of scores", folder / "scores")]
        return scored if role == "reward" else [*found, *scored]
    if (adapter := folder / "adapter").exists():
        said = adapted.read(checkpoint.read_files(adapter))
        if said is not None and said[0].merges:
            found.append(Start("a merged adapter", adapter))
        if engine.adapter_config is not None:
            found.append(Start("an adapter", adapter, parent=True))
    return found
