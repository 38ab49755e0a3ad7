"""The whole recipe: the shared sections, and models, stages and evaluations by their registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from shardwise.config import registry
from shardwise.config.artifacts import artifacts_of
from shardwise.config.callbacks import AnyCallback
from shardwise.config.names import RUN_FOLDER, RUN_NAME, shown_as
from shardwise.config.schema import (
    AnyEngine,
    EngineConfig,
    EvaluationConfig,
    JobConfig,
    LoggingConfig,
    ModelConfig,
    NativeConfig,
    ResilienceConfig,
    Section,
    Seed,
    StageConfig,
    TokenizerConfig,
    beside,
)
from shardwise.config.start import located


def _model(data: Any, info: ValidationInfo) -> Any:
    return registry.validate(data, info, "family", registry.MODEL_CONFIGS, ModelConfig)


def _stage(data: Any, info: ValidationInfo) -> Any:
    return registry.validate(data, info, "kind", registry.STAGE_CONFIGS, JobConfig)


def _evaluation(data: Any, info: ValidationInfo) -> Any:
    return registry.validate(data, info, "kind", registry.EVALUATION_CONFIGS, EvaluationConfig)


def inherit_engines(data: Any) -> Any:
    """Keys of ``engine`` passed on from the run to its stages and from a stage to its roles.

    To another kind of engine, only those that all kinds have.
    """
    if not isinstance(data, dict) or not isinstance(data.get("stages"), list):
        return data
    top = data.get("engine") or {}
    if not isinstance(top, dict):
        return data
    return {**data, "stages": [_inherit(s, top) for s in data["stages"]]}


def _inherit(part: Any, above: dict[str, Any]) -> Any:
    """A stage or a role with the keys of the engine above it, where it has none of its own."""
    if not isinstance(part, dict) or not isinstance(part.get("engine") or {}, dict):
        return part
    own = part.get("engine") or {}
    kind = above.get("kind", registry.DEFAULT_ENGINE)
    if own.get("kind", kind) != kind:
        above = {k: v for k, v in above.items() if k in EngineConfig.model_fields}
    engine = {**above, **own}
    roles = part.get("roles")
    if not isinstance(roles, dict):
        return {**part, "engine": engine}
    roles = {name: role and _inherit(role, engine) for name, role in roles.items()}
    return {**part, "engine": engine, "roles": roles}


class RunConfig(Section):
    """A whole run: one model, one tokenizer, a list of stages."""

    name: Annotated[str, RUN_FOLDER, shown_as(RUN_NAME)] = Field(
        "run", description="what the run is called in reports, and its folder"
    )
    run_dir: Path | None = Field(
        None, description="default: runs/<name>", examples=["/shared/runs/big"]
    )
    seed: Seed = Field(
        0, description="of the weights, the order of data, dropout and sampling", examples=[1234]
    )
    model: SerializeAsAny[Annotated[ModelConfig, BeforeValidator(_model)]]
    init_from: Path | None = Field(
        None,
        description="start weights: a checkpoint, a Hugging Face or PEFT folder, a GGUF file, or "
        "hf:org/name[@revision]; model and tokenizer are its own where they are left out",
        examples=["/models/SmolLM2-135M", "hf:HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    init_optimizer: bool = Field(
        False,
        description="the first stage goes on from the optimizer's state and the step that "
        "init_from holds, as a run moved from elsewhere does",
        json_schema_extra=beside(init_from="moved"),
    )
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    engine: AnyEngine = Field(default_factory=NativeConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    resilience: ResilienceConfig = Field(default_factory=ResilienceConfig)
    stages: list[SerializeAsAny[Annotated[JobConfig, BeforeValidator(_stage)]]] = Field(
        min_length=1, description="what is trained, or made, one after the other"
    )
    evaluate_start: bool = Field(
        False,
        description="also measure what init_from holds",
        json_schema_extra=beside(init_from="/models/SmolLM2-135M"),
    )
    evaluations: list[SerializeAsAny[Annotated[EvaluationConfig, BeforeValidator(_evaluation)]]] = (
        Field(default=[], description="measured on the model after each stage")
    )

    callbacks: list[AnyCallback] = Field(
        default=[], description="what else happens around the steps of stages"
    )

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit_engine(cls, data: Any) -> Any:
        return inherit_engines(data)

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        lists: dict[str, list[str]] = {
            "stages": [s.name for s in self.stages],
            "evaluations": [e.name for e in self.evaluations],
            "callbacks": [c.name for c in self.callbacks],
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
            for key, reader in artifacts_of(s):
                self._check_artifact(i, key, reader)
        if self.evaluate_start and self.init_from is None:
            raise ValueError("evaluate_start measures what init_from holds, and there is none")
        if self.init_optimizer and self.init_from is None:
            raise ValueError("init_optimizer goes on from what init_from holds, and there is none")
        said = [("evaluation", e.name, e.stages) for e in self.evaluations]
        said += [("callback", c.name, c.stages) for c in self.callbacks]
        for what, name, stages in said:
            if unknown := sorted(set(stages) - set(lists["stages"])):
                raise ValueError(
                    f"{what} {name} names the stages {', '.join(unknown)}; "
                    f"there are {', '.join(lists['stages'])}"
                )
        return self

    def _check_artifact(self, number: int, key: tuple[str | int, ...], reader: Any) -> None:
        """Refuse the artifact of a job that is none, or none before stage ``number``."""
        job, _, name = reader.from_.partition(".")
        outputs = {s.name: s.outputs for s in self.stages[:number]}
        if name in outputs.get(job, {}):
            return
        written = [f"{j}.{a}" for j, names in outputs.items() for a in names]
        self.refuse(
            ("stages", number, *key, "from"),
            f"{reader.from_} is nothing that an earlier stage writes; "
            f"these are: {', '.join(written) or 'none'}",
        )

    def training_stages(self) -> list[tuple[int, StageConfig]]:
        """Those of ``stages`` that train, with their numbers there."""
        return [(i, s) for i, s in enumerate(self.stages) if isinstance(s, StageConfig)]

    @property
    def training(self) -> list[StageConfig]:
        """Those of ``stages`` that train."""
        return [s for _, s in self.training_stages()]

    @property
    def start(self) -> Path | None:
        """Where the files of ``init_from`` lie on this machine. Raises UserError."""
        return None if self.init_from is None else located(self.init_from)

    @property
    def directory(self) -> Path:
        """Where this run lives."""
        return self.run_dir if self.run_dir is not None else Path("runs") / self.name
