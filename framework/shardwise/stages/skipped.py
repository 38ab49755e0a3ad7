"""Updates that left the weights as they were, and when they are too many for a stage to be done.

An engine skips an update whose gradients are not finite (an overflow in fp16 among them). A stage
most of whose updates were skipped has trained next to nothing: it ends with exit code 4, and what
comes after does not start from it, unless ``stages.NAME.max_skipped`` says that it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise import checkpoint
from shardwise.config.schema import JobConfig, StageConfig
from shardwise.errors import ConfigError, ExitCode, ShardwiseError


class SkippedError(ShardwiseError):
    """Most updates of a stage were skipped; ``summary`` is the run's so far."""

    exit_code = ExitCode.MOSTLY_SKIPPED

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


def counted(meta: Mapping[str, Any]) -> dict[str, int]:
    """``updates`` and ``skipped`` in a checkpoint's meta, of the role that skipped most of its."""
    engines = [meta.get("engine") or {}, *(meta.get("roles") or {}).values()]
    found = [{n: int(e.get(n, 0)) for n in ("updates", "skipped")} for e in engines]
    return max(found, key=lambda e: e["skipped"] / max(e["updates"], 1))


def too_many(counts: Mapping[str, Any], limit: float) -> str:
    """In words, how many updates were skipped if they are more than ``limit`` of all; else ""."""
    updates, skipped = int(counts.get("updates", 0)), int(counts.get("skipped", 0))
    if skipped <= limit * updates:
        return ""
    return f"{skipped} of {updates} updates were skipped (non-finite gradients)"


def may_skip(stage: JobConfig) -> float:
    """The share of skipped updates that what a stage or job starts from may have."""
    default = StageConfig.model_fields["max_skipped"].default
    return float(getattr(stage, "max_skipped", default))


def check_trained(source: Path, limit: float, key: str) -> None:
    """Refuse to start from a checkpoint whose stage skipped more than ``limit`` of its updates.

    Raises ConfigError naming the ``key`` that names ``source``.
    """
    meta = checkpoint.read_meta(source)
    if words := too_many(counted(meta), limit):
        raise ConfigError(
            f"{key}: {source}: {words}, so it is hardly trained; name another checkpoint, or set "
            "max_skipped of the stage that starts from it to 1.0"
        )
