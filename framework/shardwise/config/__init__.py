"""Strict configuration: schema, YAML with overrides, provenance of every value."""

from shardwise.config.export import config_hash, json_schema, print_config, resolved_yaml
from shardwise.config.load import LoadedConfig, load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import Section

__all__ = [
    "LoadedConfig",
    "RunConfig",
    "Section",
    "config_hash",
    "json_schema",
    "load_config",
    "print_config",
    "resolved_yaml",
]
