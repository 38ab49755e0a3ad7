"""What of a model is trained: all of it, an adapter beside it, or some of its parameters."""

from __future__ import annotations

import dataclasses

import torch

from shardwise.adapters.base import Adapter
from shardwise.adapters.registry import build_adapter
from shardwise.adapters.targets import trained_names
from shardwise.config.adapters import AdapterConfig, FreezeConfig
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.parallel.pipeline import split_model


@dataclasses.dataclass(frozen=True)
class Trained:
    """As a stage asks for it; neither: everything is trained."""

    adapter: AdapterConfig | None = None
    freeze: FreezeConfig | None = None


EVERYTHING = Trained()


def names_by_part(trained: Trained, model: DecoderConfig, num_parts: int) -> list[list[str]]:
    """The parameters that are trained, by pipeline stage."""
    model = model.model_copy(update={"vocab_size": model.vocab_size or 1 << 16})
    part, found = TrainedPart(trained, model), []
    for layers in split_model(model, num_parts):
        with torch.device("meta"):
            held = registry.build(model)
        held.keep(layers)
        part.apply(held)
        found.append([n for n, p in held.named_parameters() if p.requires_grad])
    return found


class TrainedPart:
    """The same of one model. Raises ConfigError if it cannot have it."""

    def __init__(self, trained: Trained, model: DecoderConfig) -> None:
        self.adapter: Adapter | None = None
        if trained.adapter is not None:
            self.adapter = build_adapter(trained.adapter, model)
        self.names = None if trained.freeze is None else trained_names(model, trained.freeze)

    def apply(self, model: Decoder) -> list[str]:
        """To a part of the model, on the meta device, in place.

        Returns the names of added parameters whose gradients are partial sums over tp ranks.
        """
        if self.adapter is not None:
            return self.adapter.attach(model)
        if self.names is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self.names)
        return []
