"""The whole recipe: the shared sections, and models, stages and evaluations by their registries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from shardwise.config import registry
from shardwise.config.schema import (
    RUN_FOLDER,
    RUN_NAME,
    EngineConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    ResilienceConfig,
    Section,
    Seed,
    StageConfig,
    TokenizerConfig,
    shown_as,
)


def _model(data: Any, info: ValidationInfo) -> Any:
    return _by_registry(data, info, "family", registry.MODEL_CONFIGS, ModelConfig)


def _stage(data: Any, info: ValidationInfo) -> Any:
    return _by_registry(data, info, "kind", registry.STAGE_CONFIGS, StageConfig)


def _evaluation(data: Any, info: ValidationInfo) -> Any:
    return _by_registry(data, info, "kind", registry.EVALUATION_CONFIGS, EvaluationConfig)


def _by_registry(
    data: Any, info: ValidationInfo, key: str, table: dict[str, Any], base: type[Section]
) -> Any:
    """Validate a mapping against the class registered under ``data[key]``.

    Its errors keep their own locations: pydantic unfolds a ValidationError that a validator raises.
    """
    if isinstance(data, base):
        return data
    if not isinstance(data, dict):
        raise ValueError(f"expected a mapping with the key {key!r}")
    name = data.get(key)
    if not isinstance(name, str) or name not in table:
        known = ", ".join(sorted(table))
        unknown = PydanticCustomError(
            "unknown_name",
            "unknown {key} {name}; known: {known}",
            {"key": key, "name": repr(name), "known": known},
        )
        raise ValidationError.from_exception_data(
            base.__name__, [InitErrorDetails(type=unknown, loc=(key,), input=name)]
        )
    if info.mode == "json":  # where strict mode takes a text for a path
        return table[name].model_validate_json(json.dumps(data), strict=True)
    return table[name].model_validate(data)


def _inherit_engine(part: Any, above: dict[str, Any]) -> Any:
    """A stage or a role with the keys of the engine above it, where it has none of its own."""
    if not isinstance(part, dict) or not isinstance(part.get("engine") or {}, dict):
        return part
    engine = {**above, **(part.get("engine") or {})}
    roles = part.get("roles")
    if not isinstance(roles, dict):
        return {**part, "engine": engine}
    roles = {name: role and _inherit_engine(role, engine) for name, role in roles.items()}
    return {**part, "engine": engine, "roles": roles}


class RunConfig(Section):
    """A whole run: one model, one tokenizer, a list of stages."""

    name: Annotated[str, RUN_FOLDER, shown_as(RUN_NAME)] = "run"
    run_dir: Path | None = Field(None, description="default: runs/<name>")
    seed: Seed = 0
    model: SerializeAsAny[Annotated[ModelConfig, BeforeValidator(_model)]]
    init_from: Path | None = Field(
        None, description="start weights: a shardwise checkpoint or a Hugging Face folder"
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)
    stages: list[SerializeAsAny[Annotated[StageConfig, BeforeValidator(_stage)]]] = Field(
        min_length=1
    )
    evaluate_start: bool = Field(False, description="also measure what init_from holds")
    evaluations: list[SerializeAsAny[Annotated[EvaluationConfig, BeforeValidator(_evaluation)]]] = (
        Field(default=[], description="measured on the model after each stage")
    )

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit_engine(cls, data: Any) -> Any:
        """Keys of ``engine`` pass from the run to its stages and from a stage to its roles."""
        if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
            return data
        top = data.get("engine") or {}
        if not isinstance(top, dict):
            return data
        return {**data, "stages": [_inherit_engine(s, top) for s in data["stages"]]}

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        lists: dict[str, list[str]] = {
            "stages": [s.name for s in self.stages],
            "evaluations": [e.name for e in self.evaluations],
        }
        for what, names in lists.items():
            double = sorted({n for n in names if names.count(n) > 1})
            if double:
                raise ValueError(
                    f"{what} share the name {', '.join(double)}; give each its own name"
                )
        for i, s in enumerate(self.stages):
            if s.start_from is not None and s.start_from not in lists["stages"][:i]:
                raise ValueError(
                    f"stage {s.name}: start_from names {s.start_from}, which is no earlier stage"
                )
        if self.evaluate_start and self.init_from is None:
            raise ValueError("evaluate_start measures what init_from holds, and there is none")
        for e in self.evaluations:
            if unknown := sorted(set(e.stages) - set(lists["stages"])):
                raise ValueError(
                    f"evaluation {e.name} names the stages {', '.join(unknown)}; "
                    f"there are {', '.join(lists['stages'])}"
                )
        return self

    @property
    def directory(self) -> Path:
        """Where this run lives."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name
