"""What a stage is given and what it must offer. Everything else is the loop's business."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from shardwise import checkpoint
from shardwise.adapters.peft_read import is_adapter_folder
from shardwise.adapters.trained import EVERYTHING, Trained
from shardwise.checkpoint import adapted
from shardwise.checkpoint.convert import open_model, peft_base
from shardwise.config.adapters import AdapterConfig
from shardwise.config.run import RunConfig
from shardwise.config.schema import EvaluationConfig, OptimizerConfig, RoleConfig, StageConfig
from shardwise.config.start import located
from shardwise.data.batch import MicroBatch
from shardwise.data.tokenizer import Tokenizer
from shardwise.engines.base import Engine, Setup
from shardwise.engines.registry import build_engine
from shardwise.errors import ConfigError, UserError
from shardwise.metrics.writers import MetricsLogger
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.layout import Layout, parse_layout
from shardwise.parallel.mesh import pick_device
from shardwise.stages.initial_weights import is_native, load_initial_weights
from shardwise.stages.skipped import check_trained, may_skip

ACTOR = "actor"  # the role of a stage's own model, and of its only one
REFERENCE = "reference"
TEACHER = "teacher"  # writes what a student learns
SCORERS = ("critic", "reward")  # roles with a scalar head

CACHE_FOLDER = "cache"


@dataclasses.dataclass(frozen=True)
class StageContext:
    """The run around one stage."""

    run: RunConfig
    stage: Any  # the stage's own config class
    tokenizer: Tokenizer
    directory: Path  # of the run
    logger: MetricsLogger
    parent: Path | None  # the checkpoint that the stage starts from
    finished: Mapping[str, Path] = dataclasses.field(default_factory=dict)  # earlier stages'
    inherited: AdapterConfig | None = None  # that of the parent; a job computes with it

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return dist.get_rank() == 0

    @property
    def cache(self) -> Path:
        """Where tokenised data lives between runs of the same directory."""
        return self.directory / CACHE_FOLDER

    @property
    def device(self) -> torch.device:
        """Of this rank."""
        return pick_device(self.stage.engine.device)

    @property
    def layout(self) -> Layout:
        """Of the stage's own model."""
        return role_layout(role_of(self.stage, ACTOR), dist.get_world_size())

    @property
    def model(self) -> DecoderConfig:
        """The model that this stage trains: the run's, with the stage's kind of head."""
        return self.model_of(ACTOR)

    def engine(
        self,
        optimizer: OptimizerConfig | None,
        role: str = ACTOR,
        beside: Engine | None = None,
    ) -> Engine:
        """The model of a role under its layout, on its ranks; a collective call.

        ``beside``: an engine on whose base it may stand.
        """
        config = role_of(self.stage, role)
        trained = trained_of(self.stage, role)
        merges = trained.adapter is None or trained.adapter.merges
        if not isinstance(self.stage, StageConfig) and self.inherited is not None:
            merges = self.inherited.merges
            trained = Trained(self.inherited.model_copy(update={"start": "parent"}))
        if role == ACTOR and optimizer is None and merges:
            trained = EVERYTHING  # what is only evaluated takes merged weights
        if optimizer is not None and trained.adapter is not None:
            groups = [*optimizer.groups, *trained.adapter.groups()]
            optimizer = optimizer.model_copy(update={"groups": groups})
        return build_engine(
            Setup(
                model=self.model_of(role),
                config=config.engine,
                layout=role_layout(config, dist.get_world_size()),
                device=self.device,
                # A teacher without weights of its own is none of the student's.
                seed=self.run.seed + (role == TEACHER),
                # Part of dropout's rng keys.
                stage=self.stage.name if role == ACTOR else f"{self.stage.name}/{role}",
                optimizer=optimizer,
                wide_logits=self.stage.exact_logprobs,
                trained=trained,
                beside=beside,
                ranks=config.ranks,
            )
        )

    def frozen(self, role: str, actor: Engine) -> Engine:
        """The model of a role that stands still: also after a resume it is what it was at the
        start. A reference shares the base of an actor with an adapter where it can.
        """
        if role == REFERENCE and shares_base(self.stage):
            self.load_initial_weights(actor)
            engine = self.engine(None, role, beside=actor)
        else:
            engine = self.engine(None, role)
        self.load_initial_weights(engine, role)
        return engine

    def load_initial_weights(self, engine: Engine, role: str = ACTOR) -> None:
        """Fill the weights that a role starts from; a collective call, on all ranks."""
        source = self.initial_checkpoint(role)
        outside = source is not None and source not in (self.parent, *self.finished.values())
        if source is not None and outside and is_native(source):
            key = f"the start of stages.{self.stage.name}, {role}"
            check_trained(source, may_skip(self.stage), key)
        load_initial_weights(engine, self.model_of(role), source, new_head=role != "reward")

    def adapter_description(self) -> bytes:
        """What the checkpoints of a stage with an adapter say of it and its base."""
        adapter, source = self.stage.adapter, self.initial_checkpoint(ACTOR)
        root, seed = checkpoint_root(self.directory, self.stage.name), self.run.seed
        if adapter.start == "parent" and source is not None and is_adapter_folder(source):
            source = peft_base(source)
        elif adapter.start == "parent" and source is not None:
            path = checkpoint.resolve(source)
            if (said := adapted.read(checkpoint.read_files(path))) is not None:
                source, seed = adapted.base_of(path, said[1]), said[1].get("seed", seed)
        return adapted.description(adapter, source, seed, root)

    def external(
        self,
        name: str,
        keys: Sequence[str],
        compute: Callable[[], Sequence[Any]],
        *,
        questions: Sequence[Any] | None = None,
        repeatable: bool = False,
    ) -> Sequence[Any]:
        """What comes from outside of the engines (completions, scores), an answer a key.

        A stage asks for it here, so that whoever verifies a layout can give it what one process
        was given. A key says what is asked for, whatever rank asks, and in whatever company.
        ``questions``: what is asked of each, plain data: two layouts that are given the same answer
        may have asked for different things. ``repeatable``: the same weights, on the recipe made
        small, always give the same answers, so they may be compared.
        """
        return compute()

    def watch(self, name: str, where: str, value: Any) -> None:
        """What a stage computes between its engines' calls and all ranks know, told to a verifier.

        ``value``: numbers of any shape. In a run nobody listens.
        """

    @property
    def wide(self) -> type[np.floating[Any]]:
        """Of what is kept a token: float32, or float64 where the stage computes in it."""
        return np.float64 if self.precision == "fp64" else np.float32

    @property
    def precision(self) -> str:
        """Of the stage's own model."""
        return role_of(self.stage, ACTOR).engine.precision

    def initial_checkpoint(self, role: str) -> Path | None:
        """Where a role's weights come from: named by its ``init_from``, or

        - actor: the stage's parent, or the run's ``init_from``,
        - reference: what the actor starts from,
        - reward: the latest reward model that this run has trained,
        - critic: the same (Ouyang et al. 2022, appendix C.4), or what the actor starts from.
        """
        named = role_of(self.stage, role).init_from
        if named is not None:
            if named in self.finished:
                return self.finished[named]
            try:
                return located(named)
            except UserError as error:
                known = ", ".join(self.finished) or "none"
                raise ConfigError(
                    f"stages.{self.stage.name}.roles.{role}.init_from: {named} is neither an "
                    f"earlier stage ({known}) nor a model: {error}"
                ) from error
        if self._shares_initial_checkpoint(role):
            return self.initial_checkpoint(ACTOR)
        if role in SCORERS:
            if models := self._reward_models():
                return self.finished[models[-1]]
            if role == "reward":
                raise ConfigError(
                    f"stages.{self.stage.name}.roles.reward.init_from: no stage before this one "
                    "trains a reward model; add one of kind reward, or name a checkpoint"
                )
        return self.parent or self.run.start

    def _reward_models(self) -> list[str]:
        heads = {s.name: s.head for s in self.run.training}
        return [name for name in self.finished if heads[name] == "scalar"]

    def _shares_initial_checkpoint(self, role: str) -> bool:
        """Whether a role starts from what the actor does."""
        if role_of(self.stage, role).init_from is not None:
            return False
        return role == REFERENCE or (role == "critic" and not self._reward_models())

    def model_of(self, role: str) -> DecoderConfig:
        """A role's model: that of the folder which its ``init_from`` names, or the run's."""
        named = role_of(
            self.stage, ACTOR if self._shares_initial_checkpoint(role) else role
        ).init_from
        model = self.run.model
        if named is not None and named not in {s.name for s in self.run.training}:
            path = self.initial_checkpoint(role)
            assert path is not None
            model = open_model(path).config
            if model.vocab_size == 0:  # a recipe's "the tokenizer's size"
                model = model.model_copy(update={"vocab_size": self.run.model.vocab_size})
        assert isinstance(model, DecoderConfig)
        if model.vocab_size != self.run.model.vocab_size:
            raise ConfigError(
                f"stages.{self.stage.name}.roles.{role}.init_from: that model reads a vocabulary "
                f"of {model.vocab_size}, the run's of {self.run.model.vocab_size}; roles share one"
            )
        return self.fitted(model, role)

    def fitted(self, model: DecoderConfig, role: str) -> DecoderConfig:
        """A model with the head that a role has, and the dropout that the stage can bear."""
        if self.stage.exact_logprobs:
            # Its noise would be in the ratio to the log-probabilities that were taken without.
            model = model.without_dropout()
        scalar = role in SCORERS or self.stage.head == "scalar"
        return model.as_scalar() if scalar else model


class Stage:
    """One kind of training. Registered in `stages.registry` beside its config class."""

    engine: Engine  # of the model that the stage is about
    data_hash: str

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """Consume the samples of ``step`` (a pure function of it), update, return metrics.

        ``tokens`` (over all ranks), ``loss`` and ``grad_norm`` are expected among them.
        """
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        """Metrics on data that is not trained on; the config's ``best()`` says which decides."""
        return {}

    def events(self) -> list[tuple[str, str]]:
        """What the last step has to tell, as (kind, text); the same on every rank."""
        return []

    def others(self) -> dict[str, Engine]:
        """Further models that the stage trains, by role; they are saved with its own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON that the next step needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave when the checkpoint was written."""


def roles_of(stage: Any) -> list[str]:
    """The roles that a stage may have."""
    return list(type(stage.roles).model_fields) if hasattr(stage, "roles") else [ACTOR]


def role_of(stage: Any, role: str) -> RoleConfig:
    """The config of a role; what is not said is the stage's."""
    said = getattr(getattr(stage, "roles", None), role, None)
    return said if said is not None else RoleConfig(engine=stage.engine)


def evaluations_of(run: RunConfig, stage: StageConfig) -> list[EvaluationConfig]:
    """What is measured after a stage. A model without a vocabulary's head has nothing to say."""
    if stage.head != "vocabulary":
        return []
    return [e for e in run.evaluations if not e.stages or stage.name in e.stages]


def checkpoint_root(directory: Path, stage: str) -> Path:
    """Where a stage's checkpoints live."""
    return directory / "stages" / stage / "checkpoints"


def trained_of(stage: Any, role: str) -> Trained:
    """What of a role's model is trained: of the actor what the stage says, of a critic what its
    role does, of others all.

    A reference has the actor's adapter, as it starts.
    """
    own = role in (ACTOR, REFERENCE)
    adapter = getattr(stage, "adapter", None) if own else role_of(stage, role).adapter
    if adapter is not None and stage.exact_logprobs:
        adapter = adapter.without_dropout()  # see `StageContext.fitted`
    return Trained(adapter, getattr(stage, "freeze", None) if own else None)


def shares_base(stage: Any) -> bool:
    """Whether a reference stands on the base of the actor, which has an adapter."""
    actor, reference = role_of(stage, ACTOR), role_of(stage, REFERENCE)
    alike = actor.engine == reference.engine and actor.ranks is None and reference.ranks is None
    return stage.adapter is not None and alike and reference.init_from is None


def role_layout(role: RoleConfig, world_size: int) -> Layout:
    """The layout of a role over its ranks, or over the world."""
    return parse_layout(role.engine.layout, world_size if role.ranks is None else len(role.ranks))


class DataRank(Protocol):
    """Which slice of a global batch somebody computes; see `Engine`."""

    data_rank: int
    data_size: int


def data_shard(size: int, engine: DataRank) -> tuple[np.ndarray, int]:
    """This rank's contiguous share of ``size`` items (indices), and how many of them are real.

    All ranks get the same number, so that their collectives match; where ``size`` does not
    divide, the last item repeats and must not carry loss.
    """
    if engine.data_rank < 0:  # a rank on which this engine is not
        return np.zeros(0, dtype=np.int64), 0
    share = -(-size // engine.data_size)
    mine = np.arange(engine.data_rank * share, (engine.data_rank + 1) * share)
    return np.minimum(mine, size - 1), int(np.clip(size - mine[0], 0, share))


def micro_batches(batch: MicroBatch, real_rows: int, micro_batch: int) -> list[MicroBatch]:
    """Cut a rank's rows into micro-batches; rows after ``real_rows`` lose their loss mask."""
    if real_rows < batch.input_ids_BT.shape[0]:
        mask = batch.loss_mask_BT.clone()
        mask[real_rows:] = False
        batch = dataclasses.replace(batch, loss_mask_BT=mask)
    return batch.split(micro_batch)


def mean_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The plain mean of each metric over those updates of one step that have it."""
    names = dict.fromkeys(n for row in rows for n in row)
    found = {n: [row[n] for row in rows if n in row] for n in names}
    return {n: sum(values) / len(values) for n, values in found.items()}
