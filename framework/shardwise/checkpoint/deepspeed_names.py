"""A DeepSpeed checkpoint under our names: of one of our models, or of transformers' own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardwise.checkpoint.deepspeed import MASTER, Checkpoint
from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig

WRAPPER = "module."  # in front of all names, of a model that was wrapped before


def weights(found: Checkpoint, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """fp32 masters. Raises UserError, when they are read, for those of another model."""
    return ((name, tensor) for _, name, tensor in _of(found, config, MASTER))


def optimizer(found: Checkpoint, config: DecoderConfig) -> OptimizerState | None:
    """Of what was trained; None: the optimizer kept nothing."""
    if not found.states:
        return None

    def of(kind: str) -> Iterator[tuple[str, Tensor]]:
        for theirs, name, tensor in _of(found, config, kind):
            if theirs not in found.frozen:
                yield name, tensor

    return OptimizerState(found.states, found.updates, found.steps, found.skipped, of)


def _of(found: Checkpoint, config: DecoderConfig, kind: str) -> Iterator[tuple[str, str, Tensor]]:
    """What each was called, how we call it, and what it is; one at a time."""
    wrapped = all(name.startswith(WRAPPER) for name in found.shapes)
    names = {n.removeprefix(WRAPPER) if wrapped else n: n for n in found.shapes}
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in registry.build(config).named_parameters()}
    theirs = ""

    def stored() -> Iterator[tuple[str, Tensor]]:
        nonlocal theirs
        for name, theirs in names.items():
            untrained = kind != MASTER and theirs in found.frozen
            yield name, torch.zeros(found.shapes[theirs]) if untrained else found.read(kind, theirs)

    own = shapes.keys() <= names.keys()
    if own and (other := names.keys() - shapes.keys() - found.shared):
        raise UserError(f"{found.folder}: {sorted(other)[0]} is no parameter of this model")
    named = stored() if own else registry.from_hf_tensors(config, stored())
    try:
        for name, tensor in named:
            if name not in shapes:
                continue  # another name of one that is
            if tensor.shape != shapes[name]:
                raise UserError(
                    f"{found.folder}: {theirs} has the shape {tuple(tensor.shape)}, and by the "
                    f"config {tuple(shapes[name])}; does the config belong to these weights?"
                )
            yield theirs, name, tensor
    except CheckpointError as error:
        raise UserError(f"{found.folder}: {error}") from None
