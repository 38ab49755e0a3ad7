"""The base of every section, and the kinds of numbers that sections hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from shardwise.config.paths import expand

# Every number has a range: what lies outside of it would overflow, round to 0 in fp32, or ask for
# more than any machine has, somewhere deep inside. The bounds are far beyond what is of use.
_MAX_COUNT = 2**31 - 1
_MAX, _TINY = 1e12, 1e-30


def _not_tiny(value: float) -> float:
    if value < _TINY:
        raise ValueError(f"{value} would be 0 in fp32; at least {_TINY}, please")
    return value


PositiveInt = Annotated[int, Field(ge=1, le=_MAX_COUNT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
NumBytes = Annotated[int, Field(ge=1, le=2**50)]
Rows = Annotated[int, Field(ge=1, le=2**24)]
SeqLen = Annotated[int, Field(ge=1, le=2**26)]
Vocabulary = Annotated[int, Field(ge=0, le=2**24)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, le=_MAX), AfterValidator(_not_tiny)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, le=_MAX)]
Epsilon = Annotated[float, Field(gt=0.0, le=1.0), AfterValidator(_not_tiny)]
Rate = Annotated[float, Field(gt=0.0, le=1e6), AfterValidator(_not_tiny)]
Weight = Annotated[float, Field(ge=-_MAX, le=_MAX)]
Seconds = Annotated[float, Field(ge=1e-6, le=2e6)]  # poll(2) counts milliseconds in 31 bits


def shown(**keys: Any) -> ConfigDict:
    """``model_config`` of a section with an example, for those that no example of a key begins."""
    return ConfigDict(json_schema_extra={"examples": [keys]})


def beside(**keys: Any) -> dict[str, Any]:
    """``json_schema_extra`` of a key whose example needs others beside it."""
    return {"beside": keys}


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, instances are frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,  # a key that Python has no name for (``from``)
    )

    @classmethod
    def by_key(cls) -> dict[str, FieldInfo]:
        """Its fields by the keys that a recipe has for them."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}

    @field_validator("*", mode="after")
    @classmethod
    def _expand_paths(cls, value: Any) -> Any:
        return expand(value) if isinstance(value, Path) else value

    def refuse(self, key: tuple[str | int, ...], text: str) -> NoReturn:
        """Raise for a value, under its own key, that another one forbids."""
        error = InitErrorDetails(
            type="value_error", loc=key, input=None, ctx={"error": ValueError(text)}
        )
        raise ValidationError.from_exception_data(type(self).__name__, [error])
