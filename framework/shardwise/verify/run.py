"""`shardwise.verify`: does a recipe compute, under a layout, what one process computes?"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
from shardwise.errors import ConfigError, UserError
from shardwise.parallel.layout import parse_layout
from shardwise.precision.policy import resolve
from shardwise.stages.run import check_stage
from shardwise.verify import suite
from shardwise.verify.compare import (
    Difference,
    bounds,
    compare,
    compare_scales,
    disagreements,
    full_values,
    holders,
    kind_of,
)
from shardwise.verify.pool import RankError, RankPool
from shardwise.verify.replay import Replayed, replay
from shardwise.verify.roles import layouts_of, own_layouts, parts_of, with_layouts, world_of
from shardwise.verify.shrink import sizes
from shardwise.verify.trace import Trace, record

SINGLE = "dp1.zero0"
TIMEOUT_S = 180.0
ROUNDED_AWAY = ("sentinel", "generated tokens", "generated logprobs")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One layout of one stage in one precision.

    ``worst``: for each kind of value, the largest error over its bound. ``first``: the first value
    of a training step that rounding does not explain; ``ranks`` hold its worst element, and
    ``suspect`` is the smallest part of the layout that fails too.
    """

    stage: str
    layout: str
    precision: str
    worst: dict[str, float]
    seconds: float
    first: Difference | None = None
    ranks: tuple[int, ...] = ()
    suspect: str = ""
    problem: str = ""  # why there is nothing to compare
    volumes: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every value is within its bound on every rank."""
        return self.first is None and not self.problem

    def sentence(self) -> str:
        """What failed, where, and whom to suspect."""
        if self.problem:
            return self.problem
        if self.first is None:
            return ""
        d = self.first
        text = f"first to differ: {d.kind} {d.name}, error {d.error:.2e} against {d.bound:.2e}"
        if d.worst:
            text += f", worst at {list(d.worst)}"
        if self.ranks:
            text += f" held by rank {', '.join(map(str, self.ranks))}"
        return text + (f"; suspect: {self.suspect}" if self.suspect else "")


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one process computes; in FP8, with what it scaled by."""

    values: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]


class Verifier:
    """Traces and references of one recipe, and the ranks that replay them."""

    def __init__(self, recipe: Mapping[str, Any], layouts: Sequence[str], pool: RankPool) -> None:
        self.recipe, self.pool = dict(recipe), pool
        self.layouts = [layout for text in layouts for layout in layouts_of(text)]
        self.traces: dict[str, Trace] = {}
        self.references: dict[tuple[str, str, str | None], Reference] = {}

    def trace(self, stage: str) -> Trace:
        """The stage's calls, recorded once."""
        if stage not in self.traces:
            [self.traces[stage]] = self.pool.run(
                record, self.recipe, stage, self.layouts, world=1, timeout=TIMEOUT_S
            )
        return self.traces[stage]

    def reference(self, stage: str, precision: str, layout: str = SINGLE) -> Reference:
        """What one process computes; in FP8, with the scaling domains of ``layout``."""
        [config] = [s.engine for s in self.trace(stage).run.stages if s.name == stage]
        key = (stage, precision, None if config.fp8 is None else domains_of(layout))
        if key not in self.references:
            single = self._replay(stage, SINGLE, precision, False, key[2], plain=True)
            self.references[key] = Reference(full_values(single), single[0].scales)
        return self.references[key]

    def check(
        self, stage: str, layout: str, precision: str = "fp64", compiled: bool = False
    ) -> Verdict:
        """Compare one layout; on failure, find the part of it to suspect."""
        began = time.perf_counter()
        try:
            found, ranks = self._compare(stage, layout, precision, compiled)
        except (RankError, TimeoutError) as error:
            problem = str(error).splitlines()[0]
            return Verdict(
                stage, layout, precision, {}, time.perf_counter() - began, problem=problem
            )
        worst: dict[str, float] = {}
        for d in found:
            ratio = inf if isnan(d.ratio) else d.ratio
            worst[d.kind] = max(worst.get(d.kind, 0.0), ratio)
        first = next((d for d in found if d.is_bug), None)
        problem = ""
        if first is None and (apart := disagreements(ranks)):
            rank, name = apart[0]
            what = name.replace("/", " ", 1)
            problem = f"rank {rank} holds another value of {what} than an earlier rank"
        suspect = self._suspect(stage, layout, precision, compiled) if first or problem else ""
        return Verdict(
            stage,
            layout,
            precision,
            worst,
            time.perf_counter() - began,
            first,
            tuple(holders(first.kind, first.name, first.worst, ranks)) if first else (),
            suspect,
            problem,
            ranks[0].volumes,
        )

    def judge(
        self, stage: str, layout: str, precision: str, ranks: list[Replayed]
    ) -> list[Difference]:
        """Every value that the ranks of a layout computed, against one process."""
        reference = self.reference(stage, "fp64", layout)
        exact, single = reference.values, None
        scales: list[Difference] = []
        if precision == "fp64":
            scales = compare_scales(reference.scales, ranks)
        else:
            # Rounding differently, two layouts may see amaxes that differ by a rounding, one
            # element more or less that underflows, and another of two equally likely tokens:
            # those are for fp64 to compare.
            exact = {n: v for n, v in exact.items() if kind_of(n) not in ROUNDED_AWAY}
            single = self.reference(stage, precision, layout).values
            # So may single elements of an operand round to the other neighbour.
            precision = "bf16" if reference.scales else precision
        return scales + compare(exact, bounds(exact, single, precision), full_values(ranks))

    def _compare(
        self, stage: str, layout: str, precision: str, compiled: bool
    ) -> tuple[list[Difference], list[Replayed]]:
        self.reference(stage, precision, layout)  # whose errors are not the layout's
        ranks = self._replay(stage, layout, precision, compiled)
        return self.judge(stage, layout, precision, ranks), ranks

    def _replay(
        self,
        stage: str,
        layout: str,
        precision: str,
        compiled: bool,
        domains: str | None = None,
        plain: bool = False,
    ) -> list[Replayed]:
        return self.pool.run(
            replay,
            self.trace(stage),
            layout,
            precision,
            compiled,
            domains,
            plain,
            world=world_of(layout),
            timeout=TIMEOUT_S,
        )

    def _suspect(self, stage: str, layout: str, precision: str, compiled: bool) -> str:
        """The smallest sub-layout that fails too; the layout itself if none does."""
        for part in sub_layouts(layout):
            try:
                found, ranks = self._compare(stage, part, precision, compiled)
            except (RankError, TimeoutError):
                return part
            if any(d.is_bug for d in found) or disagreements(ranks):
                return part
        return layout


def domains_of(layout: str) -> str | None:
    """The part of a layout that decides who scales what; None if that is one rank's all.

    Data ranks, ZeRO and pipelines scale each micro-batch by itself, and so does one process.
    """
    whole = parse_layout(layout, world_of(layout))
    if whole.tp == whole.cp == 1:
        return None
    context = f".cp{whole.cp}.{whole.cp_kind}" if whole.cp > 1 else ""
    return f"dp1.zero0.tp{whole.tp}{context}"


def sub_layouts(layout: str) -> list[str]:
    """Layouts with some of this one's axes, the fewest first; never the layout itself.

    Of layouts by role: each role's alone.
    """
    if "=" in layout:
        return parts_of(layout)
    axes: list[list[str]] = []
    whole = parse_layout(layout, world_of(layout))
    if whole.dp > 1:
        hybrid = f".hsdp{whole.shard}" if whole.zero and whole.shard != whole.dp else ""
        axes.append([f"dp{whole.dp}.zero{whole.zero}{hybrid}"])
    if whole.tp > 1:
        axes.append([f"tp{whole.tp}"] + ([f"tp{whole.tp}.sp"] if whole.sp else []))
    if whole.pp > 1:
        chunks = f".v{whole.virtual}" if whole.schedule.startswith("interleaved") else ""
        named = f"pp{whole.pp}.{whole.schedule}{chunks}"
        axes.append(([f"pp{whole.pp}.1f1b"] if whole.schedule != "1f1b" else []) + [named])
    if whole.cp > 1:
        axes.append([f"cp{whole.cp}.{whole.cp_kind}"])
    found: list[str] = [""]
    for choices in axes:
        found += [f"{a}.{b}" if a else b for a in found for b in choices]
    own = found[-1]  # all axes, each as it is
    return sorted((f for f in found if f and f != own), key=lambda f: (f.count("."), len(f)))


@dataclasses.dataclass(frozen=True)
class VerifyReport:
    """All verdicts, and the layouts that this recipe cannot have (with the reason).

    ``impossible`` are those of ``refused`` that were asked for by name, not as part of the suite.
    """

    verdicts: list[Verdict]
    refused: dict[str, str]
    impossible: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all that was asked for computes the right thing; of the suite, what can be."""
        tried = bool(self.verdicts) and not self.impossible
        return tried and all(v.passed for v in self.verdicts)


def verify(
    config: str | Path | Mapping[str, Any],
    layouts: Sequence[str] = (),
    *,
    stage: str | None = None,
    overrides: Sequence[str] = (),
    compiled: bool = False,
    tell: Callable[[Verdict], None] | None = None,
    pool: RankPool | None = None,
) -> VerifyReport:
    """Compare layouts of a recipe's stages with one process, in fp64 and in its own precision.

    ``layouts``: none means the recipe's own, ``suite`` the built-in ones. The recipe is made small
    (`shrink`); ranks run on this machine over gloo. A layout that cannot be is in the report, with
    the reason, and the others are tried. Raises ConfigError for a recipe that is wrong or an
    unknown stage.
    """
    run = load_config(config, overrides).config
    chosen = [s for s in run.stages if stage in (None, s.name)]
    if not chosen:
        names = ", ".join(s.name for s in run.stages)
        raise ConfigError(f"--stage {stage}: there is no such stage; known: {names}")
    recipe = run.model_dump(mode="json")  # with its nulls, which defaults would replace
    mine = pool or RankPool()
    refused: dict[tuple[str, str], str] = {}
    verdicts: list[Verdict] = []
    try:
        for one in chosen:
            own = resolve(one.engine.precision, torch.device("cpu"))
            for together in _groups(run, one, _layouts(run, one, layouts, refused, mine), refused):
                verifier = Verifier(recipe, [*together, SINGLE], mine)
                mine.prepare(1, *map(world_of, together))
                for layout, precision in itertools.product(together, dict.fromkeys(("fp64", own))):
                    verdict = verifier.check(one.name, layout, precision, compiled)
                    verdicts.append(verdict)
                    if tell is not None:
                        tell(verdict)
    finally:
        if pool is None:
            mine.close()
    told: dict[str, str] = {}
    for (name, layout), reason in refused.items():
        said = f"stage {name}: {reason}" if len(chosen) > 1 else reason
        told[layout] = f"{told[layout]}; {said}" if layout in told else said
    asked = layouts or list(told)  # the recipe's own are asked for, too
    return VerifyReport(verdicts, told, tuple(x for x in told if x in asked))


Refused = dict[tuple[str, str], str]  # (stage, layout): why


def _layouts(
    run: RunConfig, stage: StageConfig, asked: Sequence[str], refused: Refused, pool: RankPool
) -> list[str]:
    """The layouts to try, each checked against the user's own sizes and this machine's memory."""
    if not asked:
        asked = [own_layouts(stage)]
    found: dict[str, None] = {}
    for layout in [x for text in asked for x in (suite.LAYOUTS if text == "suite" else [text])]:
        try:
            check_stage(run, with_layouts(stage, layout, compile=False), world_of(layout))
            pool.room(world_of(layout))
        except UserError as error:
            refused[stage.name, layout] = str(error)
        else:
            found[layout] = None
    return list(found)


def _groups(
    run: RunConfig, stage: StageConfig, layouts: Sequence[str], refused: Refused
) -> list[list[str]]:
    """Layouts that one small model and batch suit; a layout that none suits is refused."""
    groups: list[list[str]] = []
    for layout in layouts:
        for group in (*groups, []):
            parsed = [x for text in (*group, layout, SINGLE) for x in layouts_of(text)]
            try:
                sizes(run, stage, parsed)
            except UserError as error:
                reason = str(error)
                continue
            if not group:
                groups.append(group)
            group.append(layout)
            break
        else:
            refused[stage.name, layout] = f"it cannot be made small: {reason}"
    return groups
