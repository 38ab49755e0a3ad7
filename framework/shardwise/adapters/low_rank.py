"""LoRA and DoRA as adapters: see `lora` for what they compute, `start` and `merge` for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from torch import Tensor

from shardwise import memory
from shardwise.adapters import lora, merge, start
from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.targets import MARK, targets
from shardwise.config.adapters import AdapterConfig
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder


class LowRankAdapter:
    """See `adapters.base.Adapter`."""

    def __init__(self, config: AdapterConfig, model: DecoderConfig) -> None:
        assert isinstance(config, LowRankConfig)
        self.config, self.targets = config, targets(model, config)
        self.has_dropout = config.dropout > 0

    def shape(self) -> memory.Adapted:
        """What it adds to the blocks, in the numbers that memory is reckoned with."""
        layers = {t.path.rpartition(".")[2] for t in self.targets if t.path.startswith("layers.")}
        config = self.config
        return memory.Adapted(
            max(config.of(t.path).rank for t in self.targets),
            frozenset(layers),
            config.magnitudes,
            config.init == "pissa",
            quantised=config.quantise,
        )

    def attach(self, model: Decoder) -> list[str]:
        """See `lora.attach`."""
        return lora.attach(model, self.targets, self.config)

    def start(
        self, seed: int, names: Collection[str], weight_of: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """See `start.start`."""
        for target in self.targets:
            weight = f"{target.path}.weight"
            if weight not in names:
                continue
            needed = start.needs_weights(self.config) and not target.embeds
            value = weight_of(weight) if needed else None
            for part, tensor in start.start(target, self.config, seed, value).items():
                yield f"{target.path}.{MARK}.{part}", tensor

    def merge(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """See `merge.merge`."""
        return merge.merge(named, self.targets, self.config)
