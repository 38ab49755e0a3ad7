"""In what two recipes, runs or presets differ, value by value. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.adapters.presets import ADAPTER_PRESETS
from shardwise.config.differences import differences, leaves
from shardwise.config.load import load_config
from shardwise.config.presets import Preset
from shardwise.config.redact import redact_data
from shardwise.errors import UserError
from shardwise.losses.presets import FAMILIES

TABLES: Mapping[str, Mapping[str, Preset]] = {**FAMILIES, "adapter": ADAPTER_PRESETS}
RUN_FILE = "config.yaml"  # a run's recipe, with every default


@dataclasses.dataclass(frozen=True)
class ConfigDiff:
    """``values``: dotted key to (value in A, value in B), None where it is not there.

    Stages and evaluations go by their names. ``sources``: of presets, who published them.
    """

    values: dict[str, tuple[Any, ...]]
    sources: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people, a value a line."""
        shown = {k: [json.dumps(v, ensure_ascii=False) for v in p] for k, p in self.values.items()}
        return [*self.sources, *(f"{key}: {a} against {b}" for key, (a, b) in shown.items())]


def config_diff(a: str, b: str) -> ConfigDiff:
    """Compare two recipes (a YAML file, or a run's folder) or two presets of one family.

    A preset is named as in a recipe, with its family (``dpo:trl_default``) where several have the
    name. Defaults count as said; secrets are masked. Raises UserError for what is neither, and
    ConfigError for a recipe that is not valid.
    """
    sides = [a, b]
    if all(_recipe(text) is None for text in sides):
        return _presets(a, b)
    found = []
    for text in sides:
        path = _recipe(text)
        if path is None:
            _family_of(text)  # says so, if it is no preset either
            raise UserError(f"{a} and {b}: a preset is compared with another preset")
        found.append(redact_data(load_config(path).config.model_dump(mode="json")))
    return ConfigDiff(differences(*(dict(leaves(data)) for data in found)))


def _recipe(text: str) -> Path | None:
    """The recipe that is meant, if it is one."""
    path = Path(text)
    if path.is_dir():
        if not (path / RUN_FILE).is_file():
            raise UserError(f"{path}: no run, it has no {RUN_FILE}")
        return path / RUN_FILE
    return path if path.is_file() else None


def _presets(a: str, b: str) -> ConfigDiff:
    families = [f for f in _family_of(a) if f in _family_of(b)]
    if len(families) != 1:
        known = ", ".join(families) or f"{', '.join(_family_of(a))}; {', '.join(_family_of(b))}"
        raise UserError(
            f"{a} and {b}: not presets of one family ({known}); write FAMILY:NAME for one of them"
        )
    table = TABLES[families[0]]
    left, right = (table[text.rpartition(":")[2]] for text in (a, b))
    told = tuple(f"{text}: {p.source}" for text, p in ((a, left), (b, right)))
    return ConfigDiff(differences(left.settings, right.settings), told)


def _family_of(text: str) -> list[str]:
    """The families that have a preset of this name; UserError if none has."""
    family, _, name = text.rpartition(":")
    found = [f for f, table in TABLES.items() if name in table and family in ("", f)]
    if not found:
        known = ", ".join(f"{f}:{name}" for f, table in TABLES.items() for name in table)
        raise UserError(f"{text}: no recipe, no run and no preset; presets: {known}")
    return found
