"""Layouts of one recipe, each run small and compared with what one process computes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import inf, isnan
from pathlib import Path
from typing import Any

import xxhash

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import OptimizerConfig, StageConfig
from shardwise.errors import UserError
from shardwise.parallel.layout import parse_layout
from shardwise.stages.base import role_of, roles_of
from shardwise.stages.run import check_stage, prepare_tokenizer, with_vocabulary
from shardwise.verify.compare import (
    Difference,
    bounds,
    compare,
    compare_scales,
    disagreements,
    is_rounded_away,
    losses,
    misdealt,
    origin,
    problems,
    rounded,
    undeclared,
    unknown,
)
from shardwise.verify.independence import Examined, examine, leaks_of
from shardwise.verify.notes import Reference
from shardwise.verify.pool import RankError, RankPool
from shardwise.verify.roles import Placing, layouts_of, parse, parts_of, with_layouts, world_of
from shardwise.verify.shrink import shrink
from shardwise.verify.verdict import Verdict
from shardwise.verify.walk import RESUMED, Task, Walked, walk
from shardwise.verify.watch import External

SINGLE = "dp1.zero0"
TIMEOUT_S = 180.0
SPLITS = ("rows", "padded", "documents")


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
        exact = self._exact(small, stage, domains, skip)
        if precision == "fp64":
            return exact
        # What one process loses is one draw. Another order of sums is a second one: a bound inside
        # of a loss (a clip) is met by other elements.
        splits = ("whole",) if self.fp8(small) else ("whole", "rows")
        saved = self.folder / f"single-{next(self._numbers)}.saved"
        task = self._oracle_task(small, exact, precision)
        task = dataclasses.replace(task, domains=domains, skip=skip)
        singles = [
            self._walk(
                dataclasses.replace(task, split=split, saved=None if split != "whole" else saved)
            )[0]
            for split in splits
        ]
        if singles[0].skipped != skip:  # fp16 overflowed
            return self._ask(small, stage, precision, domains, singles[0].skipped)
        lost: dict[str, float] = {}
        for single in singles:
            for name, gap in losses(single.found).items():
                lost[name] = max(gap, lost.get(name, 0.0))
        rounded = "bf16" if self.fp8(small) else precision
        limits = bounds(exact.exact, lost, rounded, optimizers_of(stage))
        return Oracle(exact.exact, limits, singles[0], exact.given, saved)

    def _exact(
        self, small: Small, stage: StageConfig, domains: str | None, skip: dict[str, list[int]]
    ) -> Oracle:
        """In fp64. ``skip``: updates that it leaves out, as the precision in question did."""
        key = (small.key, "fp64", domains)
        if key in self._oracles and not skip:
            return self._oracles[key]
        record = self.folder / f"exact-{next(self._numbers)}.safetensors"
        saved = record.with_suffix(".saved")
        task = self._task(small, SINGLE, "fp64", domains=domains, oracle=True)
        [walked] = self._walk(dataclasses.replace(task, record=record, saved=saved, skip=skip))
        reference = Reference(record)
        limits = bounds(reference, None, "fp64", optimizers_of(stage))
        found = Oracle(reference, limits, walked, walked.asked, saved)
        if not skip:
            self._oracles[key] = found
        return found

    def _oracle_task(self, small: Small, exact: Oracle, precision: str) -> Task:
        """Of one process that is compared with another."""
        task = self._task(small, SINGLE, precision, oracle=True)
        return dataclasses.replace(task, reference=exact.exact.path, given=exact.given)

    def check_splits(self, stage: str, layout: str = SINGLE) -> Verdict:
        """One process with itself: how a batch is cut into forward passes may change nothing.

        A row at a time, with more padding, packed documents apart. What differs here is no
        layout's fault, but the model's or the loss's.
        """
        began = time.perf_counter()
        small = self.small(stage, layout)
        exact = self.oracle(small, "fp64")
        worst: dict[str, float] = {}
        first, problem = None, ""
        for split in SPLITS:
            task = dataclasses.replace(self._oracle_task(small, exact, "fp64"), split=split)
            try:
                ranks = self._walk(dataclasses.replace(task, whole=False))
            except (RankError, TimeoutError) as error:
                if not isinstance(error, RankError) or error.cause != "ConfigError":
                    problem = problem or str(error).splitlines()[0]
                continue  # dropout within attention knows where in a row a document stands
            names = [n for n in exact.exact.order if n in ranks[0].found]
            found = compare(exact.exact, exact.limits, [ranks[0].found], names)
            for d in found:
                worst[d.kind] = max(worst.get(d.kind, 0.0), inf if isnan(d.ratio) else d.ratio)
            first = first or next(
                (dataclasses.replace(d, name=f"{d.name}, {split}") for d in found if d.is_bug), None
            )
        seconds = time.perf_counter() - began
        text = f"one process, {', '.join(SPLITS)}"
        return Verdict(
            stage, text, "fp64", worst, seconds, first, problem=problem, shape=small.shape
        )

    def check_independence(self, stage: str, layout: str, precision: str = "fp64") -> Verdict:
        """Whether documents of one row depend on each other, see `independence`.

        Raises UserError where there is nothing to ask.
        """
        began = time.perf_counter()
        small = self.small(stage, layout)
        if self.fp8(small):
            raise UserError("products are quantised, with scales that documents share")
        problem, found, counts = "", [], Counter[str]()
        try:
            ranks = self._examine(small, layout, precision)
            found, counts = leaks_of(ranks), sum((r.counts for r in ranks), counts)
            if not counts:
                raise UserError("no row of its micro-batches holds several documents")
        except (RankError, TimeoutError) as error:
            problem = str(error).splitlines()[0]
        suspect = ""
        if found:

            def leaks(part: str) -> bool:
                return bool(leaks_of(self._examine(small, part, precision)))

            suspect = self._suspect(small, [SINGLE, *sub_layouts(layout)], leaks) or layout
        worst = dict.fromkeys(counts, 0.0) | {d.kind: inf for d in found}
        return Verdict(
            stage,
            f"{layout}, independence",
            precision,
            worst,
            time.perf_counter() - began,
            next(iter(found), None),
            suspect,
            problem,
            shape=small.shape,
            given_up=small.given_up,
            counts=dict(counts),
        )

    def independence_task(self, small: Small, layout: str, precision: str) -> Task:
        """What the ranks of a layout are asked to `examine`."""
        task = self._task(small, layout, precision, device=self.device)
        return dataclasses.replace(task, whole=False)

    def _examine(self, small: Small, layout: str, precision: str) -> list[Examined]:
        task = self.independence_task(small, layout, precision)
        return self.pool.run(examine, task, world=world_of(layout), timeout=TIMEOUT_S)

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
            if self.whole and world_of(layout) > 1:
                task = dataclasses.replace(task, saved=task.directory.with_suffix(".saved"))
            ranks = self._walk(task)
            found = self.judge(small, layout, precision, ranks)
            found += self._resume_alone(small, task)
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

            def differs(part: str) -> bool:
                ranks = self._walk(self.task(small, part, precision, compiled))
                return any(d.is_bug for d in self.judge(small, part, precision, ranks))

            suspect = self._suspect(small, sub_layouts(layout), differs) or layout
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
        if precision != "fp64":  # what is served and evaluated at the end is compared in fp64
            names = [n for n in names[: exact.marked["ended"]] if not is_rounded_away(n)]
        found = [*misdealt(single, ranks), *problems(ranks)]
        found += compare_scales(single.scales, ranks, "" if precision == "fp64" else "loss scale")
        values = [r.found for r in ranks]
        if ranks[0].resumed is None:
            found += compare(exact, oracle.limits, values, names)
        else:
            after = set(exact.order[exact.marked["values"] : exact.marked["ended"]])
            found += compare(exact, oracle.limits, values, [n for n in names if n not in after])
            later = [n for n in names if n in after]
            found += _said_of(compare(exact, oracle.limits, values, later), "after a resume")
        found += unknown(exact, ranks)
        found += undeclared(exact, oracle.limits, ranks) + rounded(single, ranks)
        if ranks[0].resumed is not None:
            found += self._judge_resumed(oracle, precision, ranks, RESUMED)
        return found + disagreements(ranks)

    def _resume_alone(self, small: Small, task: Task) -> list[Difference]:
        """What a layout saved, taken up by one process."""
        if task.saved is None or self.fp8(small):  # histories of cut products are a layout's own
            return []
        precision, words = task.precision, "resumed on one process"
        alone = dataclasses.replace(
            self.task(small, SINGLE, precision), other=task.saved, resumes_alone=True
        )
        try:
            one = self._walk(alone)
        except RankError as error:
            why = f"{words}: {str(error).splitlines()[0]}"
            return [Difference("run", "", inf, inf, 0.0, why=why)]
        finally:
            shutil.rmtree(task.saved, ignore_errors=True)
        return self._judge_resumed(self.oracle(small, precision), precision, one, words)

    def _judge_resumed(
        self, oracle: Oracle, precision: str, ranks: list[Walked], words: str
    ) -> list[Difference]:
        """The steps after a resume from what others saved."""
        exact = oracle.exact
        later = exact.order[exact.marked["values"] : exact.marked["ended"]]
        names = [n for n in later if precision == "fp64" or not is_rounded_away(n)]
        again = [r.resumed or {} for r in ranks]
        return _said_of(compare(exact, oracle.limits, again, names), words)

    def _task(self, small: Small, layout: str, precision: str, **options: Any) -> Task:
        folder = self.folder / small.stage
        directory = self.folder / f"run-{next(self._numbers)}"
        run, stage = small.run, small.stage
        return Task(run, stage, layout, precision, folder, directory, whole=self.whole, **options)

    def _walk(self, task: Task) -> list[Walked]:
        try:
            return self.pool.run(walk, task, world=world_of(task.layout), timeout=TIMEOUT_S)
        finally:
            for end in ("", "-resumed"):
                shutil.rmtree(f"{task.directory}{end}", ignore_errors=True)

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

    def _suspect(
        self, small: Small, parts: Iterable[str], fails: Callable[[str], bool]
    ) -> str | None:
        """The first of some layouts that fails; None if none does."""
        [stage] = [s for s in small.run.stages if s.name == small.stage]
        for part in parts:
            changed = with_layouts(stage, part, compile=False, precision="bf16")
            try:
                check_stage(small.run, changed, world_of(part))
            except UserError:  # what was made small for the whole cannot have this part
                continue
            try:
                if fails(part):
                    return part
            except (RankError, TimeoutError):
                return part
        return None


def _said_of(found: list[Difference], words: str) -> list[Difference]:
    return [dataclasses.replace(d, name=f"{d.name}, {words}") for d in found]


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
    found = []
    for placing, whole in zip(parse(layout), layouts_of(layout), strict=True):
        if whole.tp == whole.cp == 1:
            continue
        context = f".cp{whole.cp}.{whole.cp_kind}" if whole.cp > 1 else ""
        found.append(str(Placing(placing.role, f"dp1.zero0.tp{whole.tp}{context}")))
    return ",".join(found) or None


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
