"""Jobs, judged as layouts are: the rows that they write are those that one process writes.

A job draws tokens, builds trees and chooses rows. In fp64 all of that must be the same for any
layout of its model and any number of ranks, also where they are killed and go on: ids, texts and
counts to the letter, numbers within 1e-9 of their size. One process computes on the plain engine
and draws without a cache, in one go. How a tree grows and what is chosen is the job's own code on
both sides: an error in that shows in the tests of its rooms, not here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.config.artifacts import artifacts_of, resolved, without_names
from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig
from shardwise.data.stand_ins import STAND_INS
from shardwise.engines.registry import as_kind
from shardwise.errors import UserError
from shardwise.parallel.layout import Layout, parse_layout, world_of
from shardwise.rewards.problem_files import write_stand_in
from shardwise.stages.jobs import JobRun
from shardwise.stages.pretrain_config import PretrainConfig
from shardwise.stages.run import run_rank
from shardwise.verify.compare import Difference
from shardwise.verify.pool import RankError, RankPool
from shardwise.verify.shrink import shrink, sizes
from shardwise.verify.suspects import sub_layouts
from shardwise.verify.verdict import Verdict

BOUND = 1e-9  # of a number's size, see design decision 4
TIMEOUT_S = 300.0
MAX_SEQ_LEN = 256  # a prompt in bytes, and an answer
SINGLE = "dp1"
# What a value is by its key, where that is more than part of a tree, or of a row.
KINDS = {
    "policy": "version", "token_ids": "tokens", "text": "tokens", "logprobs": "logprobs",
    "scores": "scores", "score": "scores", "labels": "scores",
}  # fmt: skip
_NOTHING = object()  # where there is no value
Rows = dict[str, list[Any]]  # of every artifact, and of the result's figures
Run = Callable[[dict[str, Any], str], None]


class JobChecker:
    """Layouts of one job; those with one small recipe share what one process writes.

    A context manager: its files go with it.
    """

    def __init__(self, run: RunConfig, job: JobConfig, pool: RankPool) -> None:
        self.run, self.pool, self.name = run, pool, job.name
        self._files = tempfile.TemporaryDirectory(prefix="shardwise-verify-")
        self.folder = Path(self._files.name)
        self.job = _fed(run, job, self.folder)
        self._plain: dict[str, Rows] = {}

    def __enter__(self) -> JobChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.cleanup()

    def check(self, layout: str) -> Verdict:
        """As it draws and, where it can be, greedy; on failure, with what to suspect."""
        began = time.perf_counter()
        worst: dict[str, float] = {}
        counts: Counter[str] = Counter()
        shape, where, blamed, problem, first = "", "", "", "", None
        for how, job in _variants(self.job):
            shape, recipe = self._small(job, layout)
            try:
                wanted = self._one_process(recipe)
                found = self._written(recipe, layout, run_in_two)
            except (RankError, TimeoutError) as error:
                problem = str(error).splitlines()[0]
                break
            for difference in compare_rows(wanted, found):
                counts[difference.kind] += 1
                worst[difference.kind] = max(worst.get(difference.kind, 0.0), difference.ratio)
                if first is None and difference.is_bug:
                    first = difference
            if first is not None:
                where, blamed = how, self._suspect(recipe, layout, wanted)
                break
        return Verdict(
            self.name,
            layout,
            "fp64",
            dict(worst),
            time.perf_counter() - began,
            first,
            blamed,
            problem,
            shape=shape,
            counts=dict(counts),
            where=where,
        )

    def _small(self, job: JobConfig, layout: str) -> tuple[str, dict[str, Any]]:
        """The job on a small model, with the stages whose models it asks for: in words, and as a
        recipe.
        """
        run = self.run
        parsed = [parse_layout(layout, world_of(layout)), Layout(tp=_shared_by(job))]
        stand_in = PretrainConfig(kind="pretrain", name=job.name, steps=1, engine=job.engine)
        small = sizes(run, stand_in, parsed)
        said = job.shrunk(small.stage, self.folder).model_dump(mode="json")
        said.pop("start_from")
        said["engine"] |= {"precision": "fp64", "compile": False, "device": "cpu"}
        scorer = said.get("scorer") or {}
        earlier = [s.name for s in run.training if s.name == scorer.get("model")]
        stages = [shrink(run, n, parsed[:1], self.folder).recipe["stages"][0] for n in earlier]
        recipe = run.model_dump(mode="json", include={"seed", "engine"})
        return small.model_shape, recipe | {
            "model": small.model.model_dump(mode="json") | {"max_seq_len": MAX_SEQ_LEN},
            "tokenizer": {"kind": "bytes"},
            "stages": [*stages, said],
        }

    def _one_process(self, recipe: Mapping[str, Any]) -> Rows:
        key = json.dumps(recipe, sort_keys=True)
        if key not in self._plain:
            self._plain[key] = self._written(_unshared(recipe), SINGLE, run_plainly)
        return self._plain[key]

    def _written(self, recipe: Mapping[str, Any], layout: str, run: Run) -> Rows:
        """The rows of every artifact, as the ranks of a layout write them, and the figures."""
        stages = [
            {**s, "engine": {**s["engine"], "layout": layout if s["name"] == self.name else "auto"}}
            for s in recipe["stages"]
        ]
        directory = self.folder / "run"
        config = {**recipe, "stages": stages, "run_dir": str(directory)}
        try:
            self.pool.run(run, config, self.name, world=world_of(layout), timeout=TIMEOUT_S)
            folder = directory / "stages" / self.name
            result = json.loads((folder / "result.json").read_bytes())
            files = [folder / "artifacts" / f"{name}.jsonl" for name in self.job.outputs]
            found = {f.stem: [json.loads(x) for x in f.read_bytes().splitlines()] for f in files}
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        return found | {"result": [{key: result[key] for key in ("metrics", "skip", "drop")}]}

    def _suspect(self, recipe: Mapping[str, Any], layout: str, wanted: Rows) -> str:
        """What to look at: the smallest part of what ranks do that differs, in words."""

        def fails(recipe: Mapping[str, Any], layout: str) -> bool:
            try:
                found = self._written(recipe, layout, run_whole)
            except (RankError, TimeoutError):
                return False  # a part may be refused
            return any(d.is_bug for d in compare_rows(wanted, found))

        alone = _unshared(recipe)
        if fails(alone, SINGLE):
            cached = " that draws with a cache" if hasattr(self.job, "sampling") else ""
            return f"no axis, since it differs on one process{cached}, too"
        if layout == SINGLE or not fails(recipe, layout):
            return "resume: what was there when the job was killed, and what came behind it"
        if recipe != alone and not fails(alone, layout):
            return f"rollout.tp: {_shared_by(self.job)} ranks that share a generator"
        return next((p for p in sub_layouts(layout) if fails(recipe, p)), layout)


def _variants(job: JobConfig) -> Iterator[tuple[str, JobConfig]]:
    """As it is, and where it draws, with its greediest choice."""
    yield "", job
    sampling = getattr(job, "sampling", None)
    if sampling is None or sampling.greedy:
        return
    greedy = job.model_copy(update={"sampling": sampling.model_copy(update={"greedy": True})})
    try:  # some methods need several answers
        type(job).model_validate_json(greedy.model_dump_json())
    except ValueError:
        return
    yield "drawn greedily", greedy


def _shared_by(job: JobConfig) -> int:
    """Ranks that share a generator of the job."""
    return int(getattr(getattr(job, "rollout", None), "tp", 1))


def _unshared(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """With a generator for each rank."""
    *earlier, job = recipe["stages"]
    alone = {"rollout": {**job["rollout"], "tp": 1}} if "rollout" in job else {}
    return {**recipe, "stages": [*earlier, {**job, **alone}]}


def _fed(run: RunConfig, job: JobConfig, folder: Path) -> JobConfig:
    """The job with rows to read in place of what earlier jobs would write."""
    formats = {f"{s.name}.{name}": f for s in run.stages for name, f in s.outputs.items()}
    names = sorted({reader.from_ for _, reader in artifacts_of(job)})
    fed: JobConfig = without_names(resolved(job, {n: _rows(formats[n], n, folder) for n in names}))
    return fed


def _rows(kind: str, name: str, folder: Path) -> Path:
    """A file of seeded rows of a format. Raises UserError where none can be made up."""
    if kind == "problems":
        inner = folder / name
        inner.mkdir()
        return write_stand_in(inner)
    file = folder / f"{name}.jsonl"
    rng = random.Random(name)
    if kind in ("prompt-completion", "auto"):
        numbers = [(rng.randrange(9), rng.randrange(9)) for _ in range(24)]
        rows: Iterable[Any] = (
            {
                "prompt": f"{a}+{b}",
                "completion": f"{a + b % 3}",
                "answer": f"{a + b}",
                "score": b / 9,
            }
            for a, b in numbers
        )
    elif kind in STAND_INS:
        rows = itertools.islice(STAND_INS[kind](rng), 24)
    else:
        raise UserError(f"{name}: rows of the format {kind} cannot be made up")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def run_plainly(config: dict[str, Any], job: str) -> None:
    """In a rank: by the engine, and from the rollouts, that share nothing with any other."""
    stages = [
        {**said, "engine": as_kind(s.engine, "plain").model_dump(mode="json")}
        if s.name == job
        else said
        for said, s in zip(config["stages"], load_config(config).config.stages, strict=True)
    ]
    run_rank(load_config({**config, "stages": stages}))


def run_whole(config: dict[str, Any], job: str) -> None:
    """In a rank: in one go."""
    run_rank(load_config(config))


class _KilledError(Exception):
    """The job ends here, as if its process had."""


@contextlib.contextmanager
def killed_behind(parts: int) -> Iterator[None]:
    """In a rank: what runs inside ends as if its process had, once jobs have made so many parts."""
    whole, begun = JobRun.work_on, itertools.count()

    def killed(self: JobRun, part: int, items: range) -> dict[str, float]:
        if next(begun) == parts:
            raise _KilledError
        return whole(self, part, items)

    JobRun.work_on = killed  # type: ignore[method-assign]
    try:
        with contextlib.suppress(_KilledError):
            yield
    finally:
        JobRun.work_on = whole  # type: ignore[method-assign]


def run_in_two(config: dict[str, Any], job: str) -> None:
    """In a rank: killed behind the job's first part, if there are more, and gone on with."""
    with killed_behind(1):
        return run_whole(config, job)
    run_whole(config, job)


def compare_rows(
    wanted: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Any]]
) -> Iterator[Difference]:
    """What of a job's rows is not what one process wrote, in their order; numbers always."""
    for name in dict.fromkeys((*wanted, *found)):
        kind = "tree" if name == "trees" else "rows"
        yield from _each(kind, f"{name} row", wanted.get(name, []), found.get(name, []))


def _each(kind: str, place: str, a: Sequence[Any], b: Sequence[Any]) -> Iterator[Difference]:
    for number, (x, y) in enumerate(itertools.zip_longest(a, b, fillvalue=_NOTHING)):
        yield from _compare(kind, f"{place} {number}", x, y)


def _compare(kind: str, place: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        # The weights come before what they wrote.
        for key in sorted(dict.fromkeys((*a, *b)), key=lambda k: k != "policy"):
            one, other = a.get(key, _NOTHING), b.get(key, _NOTHING)
            yield from _compare(KINDS.get(key, kind), f"{place}, {key}", one, other)
    elif isinstance(a, list) and isinstance(b, list):
        yield from _each(kind, place, a, b)
    elif isinstance(a, float) and isinstance(b, float) and math.isfinite(a):
        error, bound = abs(a - b), BOUND * max(abs(a), 1.0)
        yield Difference(kind, place, error / bound, error, bound)
    elif a != b or type(a) is not type(b):
        why = f"{_short(b)}, one process writes {_short(a)}"
        yield Difference(kind, place, math.inf, math.inf, 0.0, why=why)
    else:
        yield Difference(kind, place, 0.0, 0.0, 0.0)


def _short(value: Any) -> str:
    text = "nothing" if value is _NOTHING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
