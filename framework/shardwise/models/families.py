"""All that the house knows of a family: its table, its model, and how that is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardwise.config.schema import ModelConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.hf import Rule
from shardwise.models.common.sharding import ShardRule
from shardwise.models.common.spec import ModelSpec
from shardwise.models.configs import TABLES, Table
from shardwise.models.dense import hf
from shardwise.models.dense.model import Dense
from shardwise.models.dense.sharding import sharding


@dataclasses.dataclass(frozen=True)
class Family:
    """A row of the table."""

    table: Table
    model: type[Decoder] = Dense
    sharding: Callable[[ModelSpec], tuple[ShardRule, ...]] = sharding

    @property
    def config(self) -> type[DecoderConfig]:
        """Its keys."""
        return self.table.config

    def rules(self, config: DecoderConfig) -> list[Rule]:
        """Every tensor of a checkpoint of transformers'."""
        return hf.rules(config, self.table.names)


FAMILIES: dict[str, Family] = {name: Family(table) for name, table in TABLES.items()}


def family_of(config: ModelConfig | str) -> Family:
    """The row of a config or a name; raises ConfigError for an unknown family."""
    name = config if isinstance(config, str) else config.family
    if name not in FAMILIES:
        raise ConfigError(f"unknown model.family {name!r}; known: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
