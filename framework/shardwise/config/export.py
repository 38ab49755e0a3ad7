"""A config as text: resolved YAML, every value beside its source, JSON Schema, a hash."""

from __future__ import annotations

import json
from typing import Any

import xxhash
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from shardwise.config import registry, yaml12
from shardwise.config.load import LoadedConfig, leaves
from shardwise.config.redact import redact, redact_data
from shardwise.config.run import RunConfig
from shardwise.config.source import dotted


def resolved_yaml(config: RunConfig) -> str:
    """The whole config, defaults included, as YAML that loads to the same config.

    Secrets are redacted (see `shardwise.config.redact`).
    """
    return yaml12.dump(redact_data(config.model_dump(mode="json")))


def provenance_json(loaded: LoadedConfig) -> dict[str, dict[str, Any]]:
    """``{"stages.0.steps": {"value": 100, "source": "a.yaml:12"}, ...}``, secrets redacted."""
    return {
        dotted(path): {
            "value": value,
            "source": redact(str(loaded.provenance[dotted(path)])),
        }
        for path, value in leaves(redact_data(loaded.config.model_dump(mode="json")))
    }


def print_config(loaded: LoadedConfig) -> str:
    """One line for each value: key, value, source, aligned; secrets redacted."""
    rows = [
        (key, json.dumps(row["value"], ensure_ascii=False), row["source"])
        for key, row in provenance_json(loaded).items()
    ]
    keys = max(len(key) for key, _, _ in rows)
    values = min(40, max(len(value) for _, value, _ in rows))
    return "\n".join(f"{key:<{keys}} = {value:<{values}}  # {at}" for key, value, at in rows)


def config_hash(section: BaseModel) -> str:
    """xxh3-128 of the section's canonical JSON (sorted keys), 32 hex digits."""
    text = json.dumps(section.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _single_keys(families: dict[str, Any]) -> dict[str, Any]:
    """A model section without a family: what it says in place of the folder in ``init_from``."""
    known = {name for cls in families.values() for name in cls.model_fields}
    return {
        "title": "SingleKeys",
        "description": "over the model in init_from",
        "type": "object",
        "propertyNames": {"enum": sorted(known - {"family"})},
    }


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe, with every registered model family and stage."""
    registry.discover()
    tables: dict[str, dict[str, Any]] = {
        "model": registry.MODEL_CONFIGS,
        "adapter": registry.ADAPTER_CONFIGS,
        "engine": registry.ENGINE_CONFIGS,
        "optimizer": registry.OPTIMIZER_CONFIGS,
        "stages": registry.STAGE_CONFIGS,
        "evaluations": registry.EVALUATION_CONFIGS,
        "callbacks": registry.CALLBACK_CONFIGS,
    }
    classes = [RunConfig, *(cls for table in tables.values() for cls in table.values())]
    refs, schema = models_json_schema(
        [(cls, "validation") for cls in dict.fromkeys(classes)], title="shardwise recipe"
    )
    run = schema["$defs"].pop("RunConfig")
    run["required"].remove("model")  # which init_from may say
    run["anyOf"] = [{"required": ["model"]}, {"required": ["init_from"]}]
    for where, table in tables.items():
        key = "family" if where == "model" else "kind"
        choices = [
            {**refs[(cls, "validation")], "properties": {key: {"const": name}}, "required": [key]}
            for name, cls in sorted(table.items())
        ]
        if where == "model":
            run["properties"][where] = {"oneOf": [*choices, _single_keys(table)]}
        elif where in ("engine", "optimizer"):  # inside of others, where the kind may be left out
            for choice in choices:
                del choice["required"]
            schema["$defs"][f"{where.capitalize()}Config"] = {"anyOf": choices}
        elif where == "adapter":
            schema["$defs"]["AdapterConfig"] = {"oneOf": choices}
        else:
            run["properties"][where] = {**run["properties"][where], "items": {"oneOf": choices}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **run}
