"""`shardwise.verify`: does a recipe compute, under a layout, what one process computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig, StageConfig
from shardwise.engines.registry import as_kind
from shardwise.errors import ConfigError, UserError
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.layout import world_of as grammar_world
from shardwise.parallel.mesh import backend_of, pick_device
from shardwise.precision.policy import resolve
from shardwise.stages.base import role_of, roles_of
from shardwise.stages.run import check_job as check_job_layout
from shardwise.verify import suite
from shardwise.verify.jobs import JobChecker
from shardwise.verify.pool import RankPool
from shardwise.verify.roles import own_layouts, with_engines, with_layouts, world_of
from shardwise.verify.verdict import Verdict, VerifyReport
from shardwise.verify.verifier import Verifier

DEVICES = ("cpu", "cuda")
INDEPENDENCE = "--independence"
Refused = dict[tuple[str, str], str]  # (stage, layout): why


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
    independence: bool = False,
    engine: str | None = None,
    note: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Compare layouts of a recipe's stages with one process, in fp64 and in its own precision.

    ``layouts``: none means the recipe's own, ``suite`` the built-in ones. The recipe is made small
    (`shrink`). Ranks run on this machine, on its CPU or, with ``device`` cuda, a GPU each; the one
    process always computes on the CPU. A layout that cannot be is in the report, with the reason,
    and the others are tried. Raises ConfigError for a recipe that is wrong, an unknown stage, or
    without a GPU. ``engine``: the kind to try in place of the recipe's, its own keys at their
    defaults. ``whole``: saves, resumes and generates, besides the updates. ``note`` is told first
    what to know of the engines, ``begin`` in words what is tried next, ``tell`` what came of it.
    ``independence``: asks of every layout, too, whether documents of one row depend on each other;
    where there are none, the report has it among what cannot be.
    """
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: known: {', '.join(DEVICES)}")
    place = pick_device(device)
    run = load_config(config, overrides).config
    if engine is not None:
        run = _by_engine(run, engine)
    chosen = [s for s in run.training if stage in (None, s.name)]
    jobs = [s for s in run.stages if s.outputs and stage in (None, s.name)]
    if not chosen and not jobs:
        names = ", ".join(s.name for s in run.stages)
        raise ConfigError(f"--stage {stage}: there is no such stage; known: {names}")
    recipe = run.model_dump(mode="json")  # with its nulls, which defaults would replace
    mine = pool or RankPool(backend_of(device))
    refused: dict[tuple[str, str], str] = {}
    verdicts: list[Verdict] = []
    verifier = Verifier(recipe, mine, whole, device)

    def keep(verdict: Verdict) -> None:
        verdicts.append(verdict)
        if tell is not None:
            tell(verdict)

    notes = _remarks(chosen)
    for text in notes:
        if note is not None:
            note(text)
    try:
        for one in chosen:
            own = resolve(one.engine.precision, place)
            tried = _layouts(run, one, layouts, refused, mine, device)
            mine.prepare(1, *map(world_of, tried))
            for what, check in _checks(verifier, one, tried, own, compiled, independence, refused):
                if begin is not None:
                    begin(what)
                keep(check())
            # In FP8, the tokens of a forward pass share scales.
            if whole and tried and one.engine.fp8 is None:
                if begin is not None:
                    begin(f"{one.name}: one process with itself")
                keep(verifier.check_splits(one.name, tried[0]))
        for job in jobs:
            tried = _layouts(run, job, layouts, refused, mine, device)
            for verdict in _check_job(JobChecker(run, job, mine), tried, refused, begin):
                keep(verdict)
    finally:
        verifier.close()
        if pool is None:
            mine.close()
    tried_names = [s.name for s in (*chosen, *jobs)]
    return VerifyReport(verdicts, *_told(refused, tried_names, layouts), notes)


def _checks(
    verifier: Verifier,
    stage: StageConfig,
    layouts: Sequence[str],
    own: str,
    compiled: bool,
    independence: bool,
    refused: Refused,
) -> Iterator[tuple[str, Callable[[], Verdict]]]:
    """What is to be tried, in words, and how; what cannot be goes into ``refused``."""
    name = stage.name
    for number, layout in enumerate(layouts, 1):
        try:
            verifier.small(name, layout)
        except UserError as error:
            refused[name, layout] = f"it cannot be made small: {error}"
            continue
        for precision in _precisions(stage, layout, own):
            what = f"{name} {layout} in {precision}, layout {number} of {len(layouts)}"
            yield what, partial(verifier.check, name, layout, precision, compiled)
            if independence:
                try:
                    verdict = verifier.check_independence(name, layout, precision)
                except UserError as error:
                    refused[name, INDEPENDENCE] = str(error)
                else:
                    yield f"{what}, independence", lambda v=verdict: v  # type: ignore[misc]


def _check_job(
    checker: JobChecker,
    layouts: Sequence[str],
    refused: Refused,
    begin: Callable[[str], None] | None,
) -> Iterator[Verdict]:
    """What comes of a job's layouts; what cannot be goes into ``refused``."""
    with checker:
        for number, layout in enumerate(layouts, 1):
            if begin is not None:
                begin(f"{checker.name} {layout} in fp64, layout {number} of {len(layouts)}")
            try:
                yield checker.check(layout)
            except UserError as error:
                refused[checker.name, layout] = f"it cannot be made small: {error}"


def _remarks(stages: Sequence[StageConfig]) -> tuple[str, ...]:
    """Of all kinds of engines in use, each once."""
    engines = [role_of(stage, role).engine for stage in stages for role in roles_of(stage)]
    return tuple(dict.fromkeys(e.remark for e in engines if e.remark))


def _by_engine(run: RunConfig, kind: str) -> RunConfig:
    """The recipe with every engine of another kind."""
    stages = [with_engines(s, lambda engine, role: as_kind(engine, kind)) for s in run.training]
    return run.model_copy(update={"engine": as_kind(run.engine, kind), "stages": stages})


def _precisions(stage: StageConfig, layout: str, own: str) -> list[str]:
    """fp64 and the recipe's own, without fp64 where an engine keeps its masters in fp32."""
    exact = with_layouts(stage, layout, precision="fp64")
    engines = {role: role_of(exact, role).engine for role in roles_of(exact)}
    can = not any(
        engine.refusal(parse_layout(engine.layout, grammar_world(engine.layout)))
        for engine in engines.values()
    )
    return list(dict.fromkeys(("fp64", own) if can else (own,)))


def _told(
    refused: Refused, stages: Sequence[str], layouts: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What cannot be, with the reasons of all stages, and what of it was asked for by name."""
    told: dict[str, str] = {}
    for (name, layout), reason in refused.items():
        said = f"stage {name}: {reason}" if len(stages) > 1 else reason
        told[layout] = f"{told[layout]}; {said}" if layout in told else said
    asked = set(layouts or told)  # the recipe's own are asked for, too
    asked.discard(INDEPENDENCE)
    if all((name, INDEPENDENCE) in refused for name in stages):
        asked.add(INDEPENDENCE)
    return told, tuple(x for x in told if x in asked)


def _layouts(
    run: RunConfig,
    stage: JobConfig,
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
            check_job_layout(run, with_layouts(stage, layout, compile=False), world_of(layout))
            pool.room(world_of(layout))
            if device == "cuda" and world_of(layout) > (gpus := torch.cuda.device_count()):
                raise UserError(f"it needs {world_of(layout)} GPUs, and torch sees {gpus} here")
        except UserError as error:
            refused[stage.name, layout] = str(error)
        else:
            found[layout] = None
    return list(found)
