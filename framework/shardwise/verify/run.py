"""`shardwise.verify`: does a recipe compute, under a layout, what one process computes?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan
from pathlib import Path
from typing import Any

import torch
import xxhash

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import OptimizerConfig, StageConfig
from shardwise.errors import ConfigError, UserError
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import backend_of, pick_device
from shardwise.precision.policy import resolve
from shardwise.stages.base import role_of, roles_of
from shardwise.stages.run import check_stage, prepare_tokenizer, with_vocabulary
from shardwise.verify import suite
from shardwise.verify.compare import (
    ROUNDED_AWAY,
    Difference,
    bounds,
    coarse,
    compare,
    compare_scales,
    disagreements,
    kind_of,
    losses,
    misdealt,
    origin,
    problems,
    unknown,
)
from shardwise.verify.notes import Reference
from shardwise.verify.pool import RankError, RankPool
from shardwise.verify.roles import layouts_of, own_layouts, parts_of, with_layouts, world_of
from shardwise.verify.shrink import shrink
from shardwise.verify.walk import RESUMED, Task, Walked, walk
from shardwise.verify.watch import External

SINGLE = "dp1.zero0"
TIMEOUT_S = 180.0
DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One layout of one stage in one precision.

    ``worst``: for each kind of value, the largest error over its bound. ``first``: the first value
    of a training step that rounding does not explain; ``suspect`` is the smallest part of the
    layout that fails too.
    """

    stage: str
    layout: str
    precision: str
    worst: dict[str, float]
    seconds: float
    first: Difference | None = None
    suspect: str = ""
    problem: str = ""  # why there is nothing to compare
    volumes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    shape: str = ""  # of the small recipe, and the user's facts that it has not
    given_up: tuple[str, ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # compared, by kind
    where: str = ""  # in the update the difference begins

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
        error = d.why or f"error {d.error:.2e} against {d.bound:.2e}"
        text = f"first to differ: {d.kind} {d.name}, {error}"
        if d.worst:
            text += f", worst at {list(d.worst)}"
        if d.ranks:
            text += f" held by rank {', '.join(map(str, d.ranks))}"
        text += f"; {self.where}" if self.where else ""
        return text + (f"; suspect: {self.suspect}" if self.suspect else "")


@dataclasses.dataclass(frozen=True)
class Small:
    """One stage of a recipe made small for a layout; ``key`` tells two of them apart.

    ``shape``, ``given_up``: see `shrink`.
    """

    key: str
    run: RunConfig
    stage: str
    shape: str
    given_up: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """What one process computes, in fp64 and in the precision that is asked for."""

    exact: Reference
    limits: dict[str, float]
    single: Walked
    given: External
    saved: Path  # what it saved midway, if it did


class Verifier:
    """Oracles of one recipe, and the ranks that are compared with them.

    ``whole``: saves, resumes and serves, besides the updates. ``device``: of the ranks; the oracle
    computes on the CPU. Close it: it keeps files.
    """

    def __init__(
        self, recipe: Mapping[str, Any], pool: RankPool, whole: bool = False, device: str = "cpu"
    ) -> None:
        self.run, self.pool, self.whole = load_config(recipe).config, pool, whole
        self.device = device
        self._folder = tempfile.TemporaryDirectory(prefix="shardwise-verify-")
        self.folder = Path(self._folder.name)
        self._numbers = itertools.count()
        self._prepared: dict[str, RunConfig] = {}
        self._oracles: dict[tuple[str, str, str | None], Oracle] = {}

    def close(self) -> None:
        """Remove what oracles and layouts wrote."""
        self._folder.cleanup()

    def small(self, stage: str, layout: str) -> Small:
        """The recipe that a layout is tried on: a function of both, and of nothing else."""
        folder = self.folder / stage
        folder.mkdir(exist_ok=True)
        small = shrink(self.run, stage, layouts_of(layout), folder)
        key = xxhash.xxh3_64_hexdigest(json.dumps(small.recipe, sort_keys=True).encode())
        if key not in self._prepared:
            [run] = self.pool.run(prepare, small.recipe, folder, world=1, timeout=TIMEOUT_S)
            self._prepared[key] = run
        return Small(key, self._prepared[key], stage, small.shape, small.given_up)

    def oracle(self, small: Small, precision: str, layout: str = SINGLE) -> Oracle:
        """What one process computes; in FP8, with the scaling domains of ``layout``."""
        [stage] = [s for s in small.run.stages if s.name == small.stage]
        domains = domains_of(layout) if self.fp8(small) else None
        key = (small.key, precision, domains)
        if key not in self._oracles:
            self._oracles[key] = self._ask(small, stage, precision, domains, {})
        return self._oracles[key]

    def _ask(
        self,
        small: Small,
        stage: StageConfig,
        precision: str,
        domains: str | None,
        skip: dict[str, list[int]],
    ) -> Oracle:
        optimizers = optimizers_of(stage)
        exact = self._oracles.get((small.key, "fp64", domains))
        if exact is None or skip:
            record = self.folder / f"exact-{next(self._numbers)}.safetensors"
            saved = record.with_suffix(".saved")
            task = self._task(small, SINGLE, "fp64", domains=domains, oracle=True)
            task = dataclasses.replace(task, record=record, saved=saved, skip=skip)
            [walked] = self._walk(task)
            reference = Reference(record)
            limits = bounds(reference, None, "fp64", optimizers)
            exact = Oracle(reference, limits, walked, walked.asked, saved)
        if precision == "fp64":
            return exact
        saved = self.folder / f"single-{next(self._numbers)}.saved"
        task = self._task(small, SINGLE, precision, domains=domains, oracle=True)
        task = dataclasses.replace(
            task, reference=exact.exact.path, given=exact.given, saved=saved, skip=skip
        )
        [single] = self._walk(task)
        if single.skipped != skip:  # fp16 overflows before its loss scale has settled
            return self._ask(small, stage, precision, domains, single.skipped)
        rounded = "bf16" if stage.engine.fp8 is not None else precision
        limits = bounds(exact.exact, losses(single.found), rounded, optimizers)
        return Oracle(exact.exact, limits, single, exact.given, saved)

    def check(
        self,
        stage: str,
        layout: str,
        precision: str = "fp64",
        compiled: bool = False,
    ) -> Verdict:
        """Compare one layout; on failure, find the part of it to suspect."""
        began = time.perf_counter()
        small = self.small(stage, layout)
        worst: dict[str, float] = {}
        counts: dict[str, int] = {}
        first, problem, volumes = None, "", []
        try:
            task = self.task(small, layout, precision, compiled)
            ranks = self._walk(task)
            found = self.judge(small, layout, precision, ranks)
            for d in found:
                ratio = inf if isnan(d.ratio) else d.ratio
                worst[d.kind] = max(worst.get(d.kind, 0.0), ratio)
                counts[d.kind] = counts.get(d.kind, 0) + 1
            first, volumes = next((d for d in found if d.is_bug), None), ranks[0].volumes
        except (RankError, TimeoutError) as error:
            problem = str(error).splitlines()[0]
        suspect, where = "", ""
        if first is not None:
            where = self._origin(small, layout, precision, first, ranks)
            suspect = self._suspect(small, layout, precision, compiled)
        seconds = time.perf_counter() - began
        return Verdict(
            stage,
            layout,
            precision,
            worst,
            seconds,
            first,
            suspect,
            problem,
            volumes,
            shape=small.shape,
            given_up=small.given_up,
            counts=counts,
            where=where,
        )

    def task(self, small: Small, layout: str, precision: str, compiled: bool = False) -> Task:
        """What the ranks of a layout are asked to run, and to compare with."""
        oracle = self.oracle(small, precision, layout)
        return dataclasses.replace(
            self._task(small, layout, precision, compiled=compiled, device=self.device),
            reference=oracle.exact.path,
            given=oracle.given,
            other=oracle.saved if self.whole else None,
        )

    def judge(
        self, small: Small, layout: str, precision: str, ranks: list[Walked]
    ) -> list[Difference]:
        """What the ranks of a layout found, as differences, what is nearest to a cause first."""
        oracle = self.oracle(small, precision, layout)
        exact, single = oracle.exact, oracle.single
        names = exact.order
        if precision != "fp64":
            names = [n for n in names if kind_of(n) not in ROUNDED_AWAY]
        found = [*misdealt(single, ranks), *problems(ranks)]
        if precision == "fp64":
            found += compare_scales(single.scales, ranks)
        found += compare(exact, oracle.limits, [r.found for r in ranks], names)
        found += unknown(exact, ranks)
        grids = {n: parts[0].grid for n, parts in single.found.items() if parts and parts[0].grid}
        found += coarse(exact, grids, ranks)
        if ranks[0].resumed is not None:
            after = set(exact.order[exact.marked["values"] :])
            later = [n for n in names if n in after and not kind_of(n).startswith("generated")]
            again = [r.resumed or {} for r in ranks]
            found += [
                dataclasses.replace(d, name=f"{d.name}, {RESUMED}")
                for d in compare(exact, oracle.limits, again, later)
            ]
        return found + disagreements(ranks)

    def _task(self, small: Small, layout: str, precision: str, **options: Any) -> Task:
        folder = self.folder / small.stage
        directory = self.folder / f"run-{next(self._numbers)}"
        run, stage = small.run, small.stage
        return Task(run, stage, layout, precision, folder, directory, whole=self.whole, **options)

    def _walk(self, task: Task) -> list[Walked]:
        try:
            return self.pool.run(walk, task, world=world_of(task.layout), timeout=TIMEOUT_S)
        finally:
            for folder in self.folder.glob(f"{task.directory.name}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _origin(
        self, small: Small, layout: str, precision: str, first: Difference, ranks: list[Walked]
    ) -> str:
        """Where in the update the first difference begins: a module, or the sum of a gradient.

        Runs the update again, in fp64, where there is no rounding to mistake for it.
        """
        update = re.match(r"(?:\w+ )?update \d+", first.name)
        if update is None or precision != "fp64" or self.fp8(small):
            return ""
        oracle = self.oracle(small, precision)
        record = self.folder / f"probe-{next(self._numbers)}.safetensors"
        probe: dict[str, Any] = {"given": oracle.given, "probe": update.group()}
        task = self._task(small, SINGLE, precision, oracle=True)
        self._walk(dataclasses.replace(task, record=record, whole=False, **probe))
        task = self._task(small, layout, precision)
        try:
            again = self._walk(dataclasses.replace(task, reference=record, whole=False, **probe))
        except (RankError, TimeoutError) as error:
            return f"(its modules could not be looked at: {str(error).splitlines()[0]})"
        found = origin(Reference(record), again)
        summed = ranks[0].touched.get(f"{first.kind}/{first.name}", "")
        if not found and first.kind == "gradient" and summed:
            return f"no module differs before it; its sum came last out of {summed}"
        return found

    def fp8(self, small: Small) -> bool:
        """Whether products of the stage are quantised."""
        return any(s.engine.fp8 is not None for s in small.run.stages if s.name == small.stage)

    def _suspect(self, small: Small, layout: str, precision: str, compiled: bool) -> str:
        """The smallest sub-layout that fails too; the layout itself if none does."""
        [stage] = [s for s in small.run.stages if s.name == small.stage]
        for part in sub_layouts(layout):
            changed = with_layouts(stage, part, compile=False, precision="bf16")
            try:
                check_stage(small.run, changed, world_of(part))
            except UserError:  # what was made small for the whole cannot have this part
                continue
            try:
                ranks = self._walk(self.task(small, part, precision, compiled))
            except (RankError, TimeoutError):
                return part
            if any(d.is_bug for d in self.judge(small, part, precision, ranks)):
                return part
        return layout


def prepare(recipe: dict[str, Any], folder: Path) -> RunConfig:
    """A small recipe, its tokenizer made and its vocabulary filled in; in a rank alone."""
    run = load_config(recipe | {"run_dir": str(folder)}).config
    return with_vocabulary(run, prepare_tokenizer(run, folder, 0))


def optimizers_of(stage: StageConfig) -> dict[str, OptimizerConfig]:
    """By role, "" where there is one model."""
    roles = roles_of(stage)
    if len(roles) == 1:
        return {"": stage.optimizer}
    return {role: role_of(stage, role).optimizer or stage.optimizer for role in roles}


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
    whole: bool = True,
    begin: Callable[[str], None] | None = None,
    device: str = "cpu",
    tell: Callable[[Verdict], None] | None = None,
    pool: RankPool | None = None,
) -> VerifyReport:
    """Compare layouts of a recipe's stages with one process, in fp64 and in its own precision.

    ``layouts``: none means the recipe's own, ``suite`` the built-in ones. The recipe is made small
    (`shrink`). Ranks run on this machine, on its CPU or, with ``device`` cuda, a GPU each; the one
    process always computes on the CPU. A layout that cannot be is in the report, with the reason,
    and the others are tried. Raises ConfigError for a recipe that is wrong, an unknown stage, or
    without a GPU. ``whole``: saves, resumes and generates, besides the updates. ``begin`` is told
    in words what is tried next, ``tell`` what came of it.
    """
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: known: {', '.join(DEVICES)}")
    place = pick_device(device)
    run = load_config(config, overrides).config
    chosen = [s for s in run.stages if stage in (None, s.name)]
    if not chosen:
        names = ", ".join(s.name for s in run.stages)
        raise ConfigError(f"--stage {stage}: there is no such stage; known: {names}")
    recipe = run.model_dump(mode="json")  # with its nulls, which defaults would replace
    mine = pool or RankPool(backend_of(device))
    refused: dict[tuple[str, str], str] = {}
    verdicts: list[Verdict] = []
    verifier = Verifier(recipe, mine, whole, device)
    try:
        for one in chosen:
            own = resolve(one.engine.precision, place)
            tried = _layouts(run, one, layouts, refused, mine, device)
            mine.prepare(1, *map(world_of, tried))
            for number, layout in enumerate(tried, 1):
                try:
                    verifier.small(one.name, layout)
                except UserError as error:
                    refused[one.name, layout] = f"it cannot be made small: {error}"
                    continue
                for precision in dict.fromkeys(("fp64", own)):
                    if begin is not None:
                        of = f"layout {number} of {len(tried)}"
                        begin(f"{one.name} {layout} in {precision}, {of}")
                    verdict = verifier.check(one.name, layout, precision, compiled)
                    verdicts.append(verdict)
                    if tell is not None:
                        tell(verdict)
    finally:
        verifier.close()
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
    run: RunConfig,
    stage: StageConfig,
    asked: Sequence[str],
    refused: Refused,
    pool: RankPool,
    device: str,
) -> list[str]:
    """The layouts to try, each checked against the user's own sizes and what this machine has."""
    if not asked:
        asked = [own_layouts(stage)]
    found: dict[str, None] = {}
    for layout in [x for text in asked for x in (suite.LAYOUTS if text == "suite" else [text])]:
        try:
            check_stage(run, with_layouts(stage, layout, compile=False), world_of(layout))
            pool.room(world_of(layout))
            if device == "cuda" and world_of(layout) > (gpus := torch.cuda.device_count()):
                raise UserError(f"it needs {world_of(layout)} GPUs, and torch sees {gpus} here")
        except UserError as error:
            refused[stage.name, layout] = str(error)
        else:
            found[layout] = None
    return list(found)
