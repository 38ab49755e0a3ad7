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
from collections.abc import Mapping
from math import inf, isnan
from pathlib import Path
from typing import Any

import xxhash

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import OptimizerConfig, StageConfig
from shardwise.errors import UserError
from shardwise.stages.base import role_of, roles_of
from shardwise.stages.run import check_stage, prepare_tokenizer, with_vocabulary
from shardwise.verify.bounds import bounds, is_rounded_away, kind_of, losses
from shardwise.verify.compare import (
    Difference,
    compare,
    compare_scales,
    disagreements,
    misdealt,
    origin,
    problems,
    rounded,
    said_of,
    since_resume,
    undeclared,
    unknown,
)
from shardwise.verify.independence import examine, leaks_of
from shardwise.verify.notes import Reference
from shardwise.verify.pool import RankError, RankPool
from shardwise.verify.roles import Placing, layouts_of, parse, with_layouts, world_of
from shardwise.verify.shrink import shrink
from shardwise.verify.suspects import BEFORE, SINGLE, Outcome, suspect
from shardwise.verify.verdict import Verdict
from shardwise.verify.walk import RESUMED, Task, Walked, walk
from shardwise.verify.watch import External

TIMEOUT_S = 180.0
SPLITS = ("rows", "padded", "documents")
AFTER_A_NAN = ("skipped", "moved")
OF_PASSES = ("loss", "metric", "gradient")  # what forward and backward passes make


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
        self._probed: dict[tuple[str, str], Path] = {}  # what modules compute in an update

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
        [stage] = [s for s in small.run.training if s.name == small.stage]
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
        outcome, counts = self._leaks(small, layout, precision)
        if not outcome.error and not counts:
            raise UserError("no row of its micro-batches holds several documents")
        blamed = ""
        if outcome.found:

            def leaks(part: str) -> bool:
                return (
                    self._can(small, part, precision)
                    and self._leaks(small, part, precision)[0].failed
                )

            blamed = suspect(layout, leaks, lambda part: False)
        worst = dict.fromkeys(counts, 0.0) | {d.kind: inf for d in outcome.found}
        return Verdict(
            stage,
            f"{layout}, independence",
            precision,
            worst,
            time.perf_counter() - began,
            next(iter(outcome.found), None),
            blamed,
            outcome.problem,
            shape=small.shape,
            given_up=small.given_up,
            counts=dict(counts),
        )

    def _leaks(self, small: Small, layout: str, precision: str) -> tuple[Outcome, Counter[str]]:
        """What leaks between documents, and what was asked, by kind."""
        task = self.independence_task(small, layout, precision)
        try:
            ranks = self.pool.run(examine, task, world=world_of(layout), timeout=TIMEOUT_S)
        except (RankError, TimeoutError) as error:
            return Outcome(error=error), Counter()
        return Outcome(found=leaks_of(ranks)), sum((r.counts for r in ranks), Counter[str]())

    def independence_task(self, small: Small, layout: str, precision: str) -> Task:
        """What the ranks of a layout are asked to `examine`."""
        task = self._task(small, layout, precision, device=self.device)
        return dataclasses.replace(task, whole=False)

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
        outcome = self.outcome(small, layout, precision, compiled)
        worst: dict[str, float] = {}
        for d in outcome.found:
            worst[d.kind] = max(worst.get(d.kind, 0.0), inf if isnan(d.ratio) else d.ratio)
        first = next(iter(outcome.bugs), None)
        blamed, where = "", ""
        if first is not None:
            where = self._origin(small, layout, precision, first, outcome.ranks)
        if outcome.failed:

            def attempt(tried: Small, part: str) -> Outcome | None:
                if not self._can(tried, part, precision):
                    return None
                return self.outcome(tried, part, precision, compiled)

            def fails(part: str) -> bool:
                again = attempt(small, part)
                return again is not None and again.fails_as(outcome)

            def is_sound_at_once(part: str) -> bool:
                if self.fp8(small) or first is None or first.kind not in OF_PASSES:
                    return False
                again = attempt(_at_once(small), part)
                return again is not None and not again.failed

            blamed = suspect(layout, fails, is_sound_at_once)
        seconds = time.perf_counter() - began
        return Verdict(
            stage,
            layout,
            precision,
            worst,
            seconds,
            first,
            blamed,
            outcome.problem,
            outcome.ranks[0].volumes if outcome.ranks else [],
            shape=small.shape,
            given_up=small.given_up,
            counts=dict(Counter(d.kind for d in outcome.found)),
            where=where,
        )

    def outcome(self, small: Small, layout: str, precision: str, compiled: bool = False) -> Outcome:
        """What a layout computes, compared with the oracle; and what it saved, taken up."""
        task = self.task(small, layout, precision, compiled)
        if self.whole and world_of(layout) > 1:
            task = dataclasses.replace(task, saved=task.directory.with_suffix(".saved"))
        try:
            ranks = self._walk(task)
            found = self.judge(small, layout, precision, ranks)
            return Outcome(ranks, found + self._resume_alone(small, task))
        except (RankError, TimeoutError) as error:
            return Outcome(error=error)

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
            ended = exact.marked["ended"]
            at_the_end = [n for n in names[ended:] if kind_of(n) in AFTER_A_NAN]
            names = [n for n in names[:ended] if not is_rounded_away(n)] + at_the_end
        resumed = [p for p in problems(ranks) if p.why.startswith(RESUMED)]
        compared = compare(exact, oracle.limits, [r.found for r in ranks], names)
        dealt = misdealt(single, ranks)
        # What came before the first update that is dealt wrongly (a rollout, say) is told before.
        begin = next((i for i, d in enumerate(compared) if dealt and d.is_of(dealt[0].name)), 0)
        found = [*compared[:begin], *dealt, *(p for p in problems(ranks) if p not in resumed)]
        found += compare_scales(single.scales, ranks, "" if precision == "fp64" else "loss scale")
        found += compared[begin:]
        found += [*unknown(exact, ranks), *undeclared(exact, oracle.limits, ranks)]
        found += rounded(single, ranks)
        if ranks[0].resumed is None:
            return found + disagreements(ranks)
        found = since_resume(found, exact)
        found += resumed + self._judge_resumed(oracle, precision, ranks, RESUMED)
        return found + since_resume(disagreements(ranks), exact)

    def _resume_alone(self, small: Small, task: Task) -> list[Difference]:
        """What a layout saved, taken up by one process."""
        if task.saved is None or self.fp8(small):  # histories of cut products are a layout's own
            return []
        precision, words = task.precision, "in a resume on one process"
        # Some engines keep fp32 masters under ZeRO alone.
        single = next((x for x in (SINGLE, "dp1.zero1") if self._can(small, x, precision)), SINGLE)
        alone = dataclasses.replace(
            self.task(small, single, precision), other=task.saved, resumes_alone=True
        )
        try:
            one = self._walk(alone)
        except RankError as error:
            why = f"{words}: {str(error).splitlines()[0]}"
            return [Difference("run", "", inf, inf, 0.0, why=why)]
        finally:
            shutil.rmtree(task.saved, ignore_errors=True)
        oracle = self.oracle(small, precision)
        return problems(one) + self._judge_resumed(oracle, precision, one, words)

    def _judge_resumed(
        self, oracle: Oracle, precision: str, ranks: list[Walked], words: str
    ) -> list[Difference]:
        """The steps after a resume from what others saved."""
        exact = oracle.exact
        later = exact.order[exact.marked["values"] : exact.marked["ended"]]
        names = [n for n in later if precision == "fp64" or not is_rounded_away(n)]
        again = [r.resumed or {} for r in ranks]
        return said_of(compare(exact, oracle.limits, again, names), words)

    def _task(self, small: Small, layout: str, precision: str, **options: Any) -> Task:
        folder = self.folder / small.stage
        directory = self.folder / f"run-{next(self._numbers)}"
        run, stage = small.run, small.stage
        options["starts"] = self.folder / f"starts-{small.key}"
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
        if first.kind in BEFORE:
            return BEFORE[first.kind]
        where = "step" if first.kind == "forward pass" else "update"
        update = re.match(rf"(?:\w+ )?{where} \d+", first.name)
        made_by_modules = first.kind in (*OF_PASSES, "forward pass") and "resume" not in first.name
        if update is None or not made_by_modules or precision != "fp64" or self.fp8(small):
            return ""
        oracle = self.oracle(small, precision)
        probe: dict[str, Any] = {"given": oracle.given, "probe": update.group()}
        key = (small.key, update.group())
        if key not in self._probed:
            self._probed[key] = self.folder / f"probe-{next(self._numbers)}.safetensors"
            task = self._task(small, SINGLE, precision, oracle=True)
            self._walk(dataclasses.replace(task, record=self._probed[key], whole=False, **probe))
        record = self._probed[key]
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
        return any(s.engine.fp8 is not None for s in small.run.training if s.name == small.stage)

    def _can(self, small: Small, layout: str, precision: str) -> bool:
        """Whether what was made small for a layout can have this part of it."""
        [stage] = [s for s in small.run.training if s.name == small.stage]
        precision = "bf16" if self.fp8(small) else precision
        changed = with_layouts(stage, layout, compile=False, precision=precision)
        try:
            check_stage(small.run, changed, world_of(layout))
        except UserError:
            return False
        return True


def _at_once(small: Small) -> Small:
    """All rows of a rank in one micro-batch; what one process computes stays the same."""
    stages = []
    for stage in small.run.training:
        whole = {"micro_batch": stage.batch.global_batch}
        stages.append(stage.model_copy(update={"batch": stage.batch.model_copy(update=whole)}))
    return dataclasses.replace(small, run=small.run.model_copy(update={"stages": stages}))


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
