"""The generators of stages, jobs and evaluations, each of a rank's own or of a group of ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from shardwise.config.adapters import AdapterConfig
from shardwise.config.run import RunConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.collectives import broadcast_bytes
from shardwise.rollout.config import RolloutConfig
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.generator import Generator
from shardwise.rollout.sharded import check_tp, group_mesh
from shardwise.search.scorers import Path, Scorer
from shardwise.stages.base import StageContext

E = TypeVar("E", bound=RolloutEngine, covariant=True)


@dataclasses.dataclass(frozen=True)
class Served(Generic[E]):
    """What generates, and which part of the work its ranks take.

    ``group``: the number of the ranks that share it, of ``groups``; ``place``: of this rank among
    them. They make the same calls in the same order, and the first of them (``place`` 0) speaks.
    """

    generator: E
    group: int
    groups: int
    place: int

    @property
    def tp(self) -> int:
        """Ranks that share it."""
        return dist.get_world_size() // self.groups

    def agreed(self, scorer: Scorer) -> Scorer:
        """A scorer whose scores, which may hang on a clock, are the first rank's for all."""
        mesh = getattr(getattr(self.generator, "backend", None), "mesh", None)
        return scorer if mesh is None else _Agreed(scorer, mesh.groups["tp"])


def serve(
    ctx: StageContext,
    dtype: torch.dtype,
    *,
    said: RolloutConfig | None = None,
    adapter: AdapterConfig | None = None,
) -> Served[Generator]:
    """A generator that has no weights yet, as a ``rollout`` section says: the evaluation's own
    (``said``), or the stage's; a collective call. ``adapter``: what the weights come with.
    """
    if said is None:
        said = getattr(ctx.stage, "rollout", RolloutConfig())
    assert said is not None
    key, rank, world = f"stages.{ctx.stage.name}.rollout.tp", dist.get_rank(), dist.get_world_size()
    beside = None if adapter is None or adapter.merges else adapter
    assert isinstance(ctx.run.model, DecoderConfig)
    check_tp(said.tp, ctx.run.model, world, key)
    if said.tp > 1 and beside is not None:
        raise ConfigError(_unmerged(key, beside))
    generator = Generator(
        ctx.run.model,
        dtype,
        ctx.device,
        said.max_slots,
        max_cache_tokens=said.max_cache_tokens,
        decode_text=ctx.tokenizer.decode,
        adapter=beside,
        mesh=group_mesh(said.tp, ctx.device),
    )
    return Served(generator, rank // said.tp, world // said.tp, rank % said.tp)


def check_served(run: RunConfig, stage: object, world_size: int) -> None:
    """Raise ConfigError for a stage or job whose ``rollout.tp``, or that of an evaluation behind
    it, nobody can have.
    """
    assert isinstance(run.model, DecoderConfig)
    adapter = getattr(stage, "adapter", None)
    for key, said in _sections(run, stage):
        check_tp(said.tp, run.model, world_size, key)
        if said.tp > 1 and adapter is not None and not adapter.merges:
            raise ConfigError(_unmerged(key, adapter))


def _sections(run: RunConfig, stage: object) -> Iterator[tuple[str, RolloutConfig]]:
    if isinstance(said := getattr(stage, "rollout", None), RolloutConfig):
        yield f"stages.{stage.name}.rollout.tp", said  # type: ignore[attr-defined]
    for i, evaluation in enumerate(run.evaluations):
        if isinstance(said := getattr(evaluation, "rollout", None), RolloutConfig):
            yield f"evaluations.{i}.rollout.tp", said


def _unmerged(key: str, adapter: AdapterConfig) -> str:
    return (
        f"{key}: an adapter of kind {adapter.kind} is not merged, and a generator with it cannot "
        "be cut; set rollout.tp to 1, or take an adapter that merges"
    )


class _Agreed:
    """See `Served.agreed`."""

    def __init__(self, scorer: Scorer, group: dist.ProcessGroup) -> None:
        self.scorer, self.group = scorer, group
        self.name, self.samples, self.reads = scorer.name, scorer.samples, scorer.reads

    def __call__(self, paths: Sequence[Path]) -> list[float | None]:
        """See `Scorer`."""
        first = self.group.rank() == 0
        said = json.dumps(self.scorer(paths)).encode() if first else None
        return list(json.loads(broadcast_bytes(said, 0, self.group)))
