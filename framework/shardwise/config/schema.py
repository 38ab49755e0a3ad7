"""The sections that every run shares. Strict: an unknown key is an error, values never change type.

Sections that belong to one room (a data source, a reward, a rollout) live in that room and derive
from `Section`; models and stages register theirs in `shardwise.config.registry`. Modules that
define sections import no torch, so that commands without tensors start at once. The whole recipe
is `shardwise.config.run.RunConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from shardwise.config import registry
from shardwise.config.adapters import AnyAdapter, FreezeConfig
from shardwise.config.fp8 import Fp8Config as Fp8Config
from shardwise.config.fp8 import SentinelConfig as SentinelConfig
from shardwise.config.metrics import Logs, StageLogs
from shardwise.config.names import FOLDER_NAME, STAGE_NAME, Name, shown_as
from shardwise.config.optimizers import AdamWConfig as AdamWConfig
from shardwise.config.optimizers import AnyOptimizer
from shardwise.config.optimizers import OptimizerConfig as OptimizerConfig
from shardwise.config.section import BelowOne as BelowOne
from shardwise.config.section import Epsilon as Epsilon
from shardwise.config.section import Fraction as Fraction
from shardwise.config.section import NonNegativeFloat as NonNegativeFloat
from shardwise.config.section import NonNegativeInt as NonNegativeInt
from shardwise.config.section import NumBytes as NumBytes
from shardwise.config.section import PositiveFloat as PositiveFloat
from shardwise.config.section import PositiveInt as PositiveInt
from shardwise.config.section import Rate as Rate
from shardwise.config.section import Rows as Rows
from shardwise.config.section import Seconds as Seconds
from shardwise.config.section import Section as Section
from shardwise.config.section import Seed as Seed
from shardwise.config.section import SeqLen as SeqLen
from shardwise.config.section import Vocabulary as Vocabulary
from shardwise.config.section import Weight as Weight
from shardwise.config.section import beside as beside
from shardwise.config.section import shown as shown


class DataSection(Section):
    """What a stage learns from, where it is in files."""

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """The same with little data, in ``folder`` if need be, for rows of ``seq_len`` tokens."""
        return self


class ModelConfig(Section):
    """The architecture; what every family has.

    Families derive from it and register themselves.
    """

    family: str = Field(description="which architecture")
    vocab_size: Vocabulary = Field(0, description="0: take the tokenizer's size", examples=[50_257])
    max_seq_len: SeqLen = Field(2048, description="longest row in tokens")


class TokenizerConfig(Section):
    """Which tokenizer: trained here, read from a file, or plain bytes."""

    kind: Literal["bytes", "bpe", "file", "tiktoken", "sentencepiece"] = Field(
        "bytes", description="bytes need no file; bpe is trained here on the run's own text"
    )
    path: Path | None = Field(
        None, description="tokenizer.json, a tiktoken or a .model file", examples=["tokenizer.json"]
    )
    split: Literal["gpt2", "cl100k", "o200k"] | None = Field(
        None,
        description="how a tiktoken file splits text; null: by the file's name",
        json_schema_extra=beside(kind="tiktoken", path="o200k_base.tiktoken"),
    )
    vocab_size: Annotated[Vocabulary, Field(ge=1)] = Field(
        4096, description="size of a BPE vocabulary trained here"
    )
    sample_bytes: NumBytes = Field(8_000_000, description="bytes of text that train a BPE")
    chat_template: str | None = Field(
        None, description="Jinja source or a path; null: ChatML", examples=["chat_template.jinja"]
    )

    @model_validator(mode="after")
    def _path_and_kind_agree(self) -> TokenizerConfig:
        if self.kind == "bytes" and self.path is not None:
            raise ValueError(
                "path is given, but kind bytes reads no file; write kind: file (tokenizer.json), "
                "tiktoken or sentencepiece, or leave path out"
            )
        if self.kind in ("file", "tiktoken", "sentencepiece") and self.path is None:
            raise ValueError(f"kind {self.kind} needs a path")
        if self.split is not None and self.kind != "tiktoken":
            raise ValueError(f"split is of kind tiktoken alone, not of {self.kind}; leave it out")
        return self


class EngineConfig(Section):
    """What computes, in which layout and precision; what every kind of engine has.

    Kinds derive from it, fix ``kind`` and register themselves.

    ``remark``: what a reader of `verify`'s figures should know of them.
    """

    remark: ClassVar[str] = ""

    kind: str = Field(description="what computes")
    layout: str = Field(
        "auto",
        description="layout grammar, e.g. dp2.zero2; auto: all ranks dp",
        examples=["dp2.zero2"],
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "fp32", description="auto: bf16 where the hardware multiplies it, else fp32"
    )
    fp8: Fp8Config | None = Field(None, description="quantised products; null: off")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="0: no clipping")
    timeout_s: Seconds = Field(
        600.0, description="seconds that ranks wait in a step for one that sleeps or computes"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs where there are some"
    )

    def for_verify(self) -> Self:
        """As `verify` computes it with: a kind may allow what training may not have."""
        return self

    def refusal(self, layout: Any, stage: StageConfig | None = None) -> str | None:
        """Why this kind cannot train ``stage`` on a parsed layout; None: it can.

        What its model, batch and sizes allow besides is `parallel.feasible`'s.
        """
        return None


class NativeConfig(EngineConfig):
    """The project's own engine: every layout."""

    kind: Literal["native"] = "native"
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what the backward pass computes again, to save memory; selective: norms, "
        "rotations and activations; full: whole blocks",
    )
    compile: bool | Literal["auto"] = Field("auto", description="torch.compile each block")


def _engine(data: Any, info: ValidationInfo) -> Any:
    return registry.validate(
        data, info, "kind", registry.ENGINE_CONFIGS, EngineConfig, registry.DEFAULT_ENGINE
    )


# What a mapping without ``kind`` is must be known wherever a section is read.
registry.register_engine_config(registry.DEFAULT_ENGINE, NativeConfig)
AnyEngine = SerializeAsAny[Annotated[EngineConfig, BeforeValidator(_engine)]]


class BatchConfig(Section):
    """The arithmetic of one step, in sequences (or prompts, for reinforcement learning)."""

    global_batch: Rows = Field(8, description="sequences of one update, over all ranks")
    micro_batch: Rows = Field(8, description="sequences a rank computes at once")
    seq_len: SeqLen = Field(256, description="tokens of a row")
    ramp_start: Rows | None = Field(None, description="first global batch of a ramp", examples=[2])
    ramp_steps: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        0, description="steps until the full global batch", examples=[50]
    )


class ScheduleConfig(Section):
    """Learning-rate schedule over a stage's steps, as a factor of ``optimizer.lr``.

    What more steps for a stage that runs or is finished mean for each: `shardwise.optim.schedules`.
    """

    kind: Literal["constant", "linear", "cosine", "cosine_restarts", "wsd"] = Field(
        "cosine", description="shape of the rate behind the warm-up"
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="steps in which the rate rises from 0 to optimizer.lr", examples=[10]
    )
    min_ratio: Fraction = Field(
        0.0, description="final learning rate over the peak", examples=[0.1]
    )
    decay_steps: NonNegativeInt = Field(
        0, description="WSD: steps of the final decay", examples=[20]
    )
    cycle_steps: NonNegativeInt = Field(
        0, description="cosine_restarts: steps of the first cycle", examples=[50]
    )
    cycle_factor: Rate = Field(
        1.0, description="cosine_restarts: growth of each cycle", examples=[2.0]
    )

    @model_validator(mode="after")
    def _has_its_own_steps(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.decay_steps < 1:
            raise ValueError("kind wsd needs decay_steps of at least 1")
        if self.kind == "cosine_restarts":
            if self.cycle_steps < 1:
                raise ValueError("kind cosine_restarts needs cycle_steps of at least 1")
            if self.cycle_factor < 1.0:
                raise ValueError(
                    f"cycle_factor {self.cycle_factor}: cycles may not shrink; give 1.0 or more"
                )
        return self

    def shrunk(self) -> Self:
        """The same kind for three steps or more: each of its phases has one, but the last."""
        keys = ("warmup_steps", "decay_steps", "cycle_steps")
        return self.model_copy(update={key: min(getattr(self, key), 1) for key in keys})

    def misfit(self, steps: int) -> tuple[str, str] | None:
        """The key that does not fit into a stage of ``steps`` and why; None if all do."""
        warmup, decay, cycle = self.warmup_steps, self.decay_steps, self.cycle_steps
        if warmup > steps:
            return "warmup_steps", (
                f"{warmup} steps of warm-up are more than the stage's {steps}; the learning rate "
                f"would end at {steps / warmup:.0%} of optimizer.lr"
            )
        if self.kind == "wsd" and warmup + decay > steps:
            return "decay_steps", (
                f"warmup_steps {warmup} + decay_steps {decay} are more than the stage's {steps}"
            )
        if self.kind == "cosine_restarts" and warmup + cycle > steps:
            return "cycle_steps", (
                f"warmup_steps {warmup} + cycle_steps {cycle} are more than the stage's {steps}; "
                "not one cycle would end (kind cosine has one for the whole stage)"
            )
        return None


class CheckpointConfig(Section):
    """When to save and what to keep. The last step of a stage is always saved."""

    every: NonNegativeInt = Field(
        0, description="steps between saves; 0: only at the end", examples=[100]
    )
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="also keep the best by validation")
    asynchronous: bool = Field(False, description="write in the background while training goes on")


class ValidationConfig(Section):
    """Validation during a stage."""

    every: NonNegativeInt = Field(
        0, description="steps between validations; 0: only at the end", examples=[50]
    )
    at_start: bool = Field(False, description="also before the first step")
    max_batches: NonNegativeInt = Field(
        0, description="of batch.global_batch rows; 0: the whole validation set", examples=[10]
    )

    def shrunk(self) -> Self:
        """Within a few steps, on a few batches: of a whole set, the last one may not be whole."""
        small = {"every": min(self.every, 2), "max_batches": min(self.max_batches, 2) or 8}
        return self.model_copy(update=small)


class LoggingConfig(Section):
    """Who is told. metrics.jsonl is always written."""

    every: PositiveInt = Field(1, description="steps between lines of metrics")
    tensorboard: bool = Field(
        False, description="also write TensorBoard's files into the run's folder"
    )
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="also tell Weights & Biases"
    )
    wandb_project: str = Field("shardwise", description="its project")
    trace: bool = Field(
        False, description="profile and count the communication of one step of each stage"
    )


class ResilienceConfig(Section):
    """What happens when a run is told to stop, and when it stands still."""

    grace_s: Seconds = Field(
        25.0,
        description="seconds from SIGTERM, SIGUSR1 or SIGHUP to the end: half for the step in "
        "progress, half to save; keep it below what scheduler and torchrun (30) allow",
    )
    stopped_s: Seconds = Field(20.0, description="a stopped process ends the run after this")
    stuck_s: Seconds = Field(
        30.0, description="ranks that all wait in collectives while none computes: the same"
    )


@dataclasses.dataclass(frozen=True)
class SmallSizes:
    """The sizes of a stage that is run for what it computes alone (`shardwise.verify`)."""

    steps: int
    rows: int  # of an update
    micro_batch: int
    seq_len: int
    ramp_start: int | None = None


class JobConfig(Section, Logs):
    """What every entry of ``stages`` has.

    A job that trains is a stage (`StageConfig`). Others compute with a model that stands still, or
    with none, and write rows: they derive from this, fix ``kind`` and register themselves.

    ``outputs``: what it writes, by name, and the format of its rows (`shardwise.data.formats`).
    """

    outputs: ClassVar[Mapping[str, str]] = {}
    head: ClassVar[Literal["vocabulary", "scalar"]] = "vocabulary"
    exact_logprobs: ClassVar[bool] = False

    kind: str = Field(description="what the stage does")
    name: Annotated[Name, FOLDER_NAME, shown_as(STAGE_NAME)] = Field(examples=["first"])
    start_from: str | None = Field(
        None,
        description="an earlier stage; default: the latest whose model writes text",
        examples=["pretrain"],
    )
    engine: AnyEngine = Field(
        default_factory=NativeConfig,
        description="top-level engine, overridden key by key",
    )

    @property
    def unused_roles(self) -> frozenset[str]:
        """Declared roles that the settings do not ask for."""
        return frozenset()

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """The same on little data, which lies in ``folder`` if need be (`shardwise.verify`)."""
        return self.model_copy(update=self._shrunk_data(small, folder))

    def _shrunk_data(self, small: SmallSizes, folder: Path) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value.shrunk(folder, small.seq_len)
            for name, value in found.items()
            if isinstance(value, DataSection)
        }


class StageConfig(JobConfig, StageLogs):
    """What every job has that trains.

    Stages derive from it, fix ``kind`` and register themselves.

    ``head`` is that of the model which the stage trains; only a vocabulary's can write text.
    ``on_policy``: from its own completions. ``exact_logprobs``: log-probabilities of two
    computations are compared, so logits are wide and there is no dropout.
    ``scores_steps``: its scalar head is read at the ends of steps, not of answers alone.
    ``small_seq_len``: tokens (bytes) that a row of little data needs.
    """

    on_policy: ClassVar[bool] = False
    scores_steps: ClassVar[bool] = False
    small_seq_len: ClassVar[int] = 160

    steps: PositiveInt = Field(description="updates", examples=[100])
    batch: BatchConfig = Field(default_factory=BatchConfig)
    optimizer: AnyOptimizer = Field(default_factory=AdamWConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    adapter: AnyAdapter | None = Field(
        None, description="trained in place of the model, which stands still; null: the model is"
    )
    freeze: FreezeConfig | None = Field(None, description="parts that stand still; null: none")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    max_skipped: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="share of skipped updates (non-finite gradients) beyond which the stage is not "
        "done (exit code 4) and no start; 1.0: whatever it be",
    )

    @model_validator(mode="after")
    def _schedules_fit(self) -> Self:
        misfit = self.schedule.misfit(self.steps)
        if misfit is not None:
            self.refuse(("schedule", misfit[0]), f"{misfit[1]}; give fewer, or more steps")
        if self.batch.ramp_steps > self.steps:
            self.refuse(
                ("batch", "ramp_steps"),
                f"a ramp of {self.batch.ramp_steps} steps in a stage of {self.steps} never comes "
                "to global_batch; give fewer, or more steps",
            )
        if self.adapter is not None and self.freeze is not None:
            self.refuse(("freeze",), "beside an adapter all stands still already; leave one out")
        return self

    @property
    def updates_per_batch(self) -> int:
        """Updates into which a global batch is cut."""
        return 1

    def shrunk(self, small: SmallSizes, folder: Path) -> Self:
        """The same training in a few steps on little data, which lies in ``folder`` if need be.

        A stage overrides it for sizes of its own; what it computes must stay.
        """
        updates = self._shrunk_data(small, folder)
        ramp = {} if small.ramp_start is None else {"ramp_start": small.ramp_start}
        updates["batch"] = BatchConfig(
            global_batch=small.rows * self.updates_per_batch,
            micro_batch=small.micro_batch,
            seq_len=small.seq_len,
            ramp_steps=min(self.batch.ramp_steps, small.steps - 1) if small.ramp_start else 0,
            **ramp,
        )
        updates["optimizer"] = self.optimizer.shrunk()
        updates["steps"] = small.steps
        updates["schedule"] = self.schedule.shrunk()
        updates["validation"] = self.validation.shrunk()
        updates["adapter"] = self.adapter and self.adapter.shrunk()
        return self.model_copy(update=updates)


class RoleConfig(Section):
    """One model of a stage that has several (actor, critic, reference, reward)."""

    engine: AnyEngine = Field(
        default_factory=NativeConfig, description="the stage's engine, overridden key by key"
    )
    ranks: list[NonNegativeInt] | None = Field(
        None,
        min_length=1,
        description="ranks of the world that hold it; null: all",
        examples=[[0, 1]],
    )
    init_from: str | None = Field(
        None,
        description="an earlier stage, a shardwise checkpoint or a Hugging Face folder",
        examples=["/models/reward"],
    )
    optimizer: AnyOptimizer | None = Field(None, description="critic; default: the stage's")
    adapter: AnyAdapter | None = Field(
        None, description="critic: trained in place of its model; default: the model is"
    )

    @model_validator(mode="after")
    def _ranks_ascend(self) -> RoleConfig:
        if self.ranks is not None and self.ranks != sorted(set(self.ranks)):
            raise ValueError(f"ranks {self.ranks} must ascend, each named once")
        return self


class EvaluationConfig(Section, Logs):
    """What every evaluation has.

    Evaluations derive from it, fix ``kind`` and register.

    ``scores_steps``: its scalar head is read at the ends of steps, not of answers alone.
    ``small_seq_len``: tokens (bytes) that a row of little data needs at least.
    """

    small_seq_len: ClassVar[int] = 0

    kind: str = Field(description="what is measured")
    name: Name = Field(examples=["held_out"])
    stages: list[str] = Field(
        default=[], description="measured after these; none: after all", examples=[["sft", "grpo"]]
    )

    def check(self) -> None:
        """Raise UserError for what cannot be measured, before anything starts."""

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> EvaluationConfig:
        """The same measurement of little, after a small ``stage``: see `StageConfig.shrunk`."""
        return self
