"""Names that become folders of a run; what is built from them must stay inside of it."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field


def _kind(data: dict[str, Any]) -> str:
    return str(data.get("kind", ""))


Name = Annotated[str, Field(min_length=1, default_factory=_kind, description="default: the kind")]


STAGE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$"
RUN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"


def shown_as(pattern: str) -> Any:
    return Field(json_schema_extra={"pattern": pattern})


def _checked(pattern: str, allowed: str) -> AfterValidator:
    """A name that becomes a folder's."""

    def check(name: str) -> str:
        if not re.fullmatch(pattern.strip("^$"), name):
            raise ValueError(
                f"{name!r} cannot name a folder; allowed: up to 100 letters, digits, {allowed}"
            )
        return name

    return AfterValidator(check)


FOLDER_NAME = _checked(STAGE_NAME, "'_' and '-', the first one no '-'")
RUN_FOLDER = _checked(RUN_NAME, "'_', '-' and '.', the first one no '-' or '.'")
