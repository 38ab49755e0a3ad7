"""What of a model is trained: all of it, an adapter beside it, or some of its parameters."""

from __future__ import annotations

import dataclasses

from shardwise.adapters.base import Adapter
from shardwise.adapters.registry import build_adapter
from shardwise.adapters.targets import trained_names
from shardwise.config.adapters import AdapterConfig, FreezeConfig
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Trained:
    """As a stage asks for it; neither: everything is trained."""

    adapter: AdapterConfig | None = None
    freeze: FreezeConfig | None = None


EVERYTHING = Trained()


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
