"""Which class of transformers a config.json is of, and which one can say a config of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import CheckpointError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.configs import TABLES
from shardwise.models.dense.release import Release


def releases() -> list[Release]:
    """Those of all families."""
    return [release for table in TABLES.values() for release in table.releases]


def release_of(model_type: Any) -> Release | None:
    """The one of a config.json's model_type."""
    return next((r for r in releases() if r.model_type == model_type), None)


def release_for(config: DecoderConfig, first: Release | None = None) -> Release:
    """A class that computes what ``config`` says, ``first`` if it does.

    Raises CheckpointError, naming what the nearest one has otherwise, if there is none.
    """
    known = list(TABLES[config.family].releases)
    asked = sorted(known, key=lambda release: release is not first)
    lacking = {release: release.lacks(config) for release in asked}
    nearest = min(asked, key=lambda release: len(lacking[release]))
    if lacking[nearest]:
        raise CheckpointError(
            f"no transformers class computes this {config.family} model; the nearest, "
            f"{nearest.name}{nearest.decoder}, has otherwise: {', '.join(lacking[nearest])}"
        )
    return nearest


def unsupported(raw: Mapping[str, Any]) -> str:
    """Why a config.json of another model_type is not read."""
    known = ", ".join(release.model_type for release in releases())
    return f"model_type {raw.get('model_type')!r} is not supported; supported: {known}"
