"""Published settings as data: what each source says, and where."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a section of a recipe, with their source."""

    source: str
    settings: Mapping[str, Any]
