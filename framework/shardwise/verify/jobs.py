"""Jobs, judged as layouts are: the rows that they write are those that one process writes.

A job draws tokens, builds trees and chooses rows. In fp64 all of that must be the same for any
layout of its model and any number of ranks: ids, texts and counts to the letter, numbers within
1e-9 of their size. What one process writes is the job's own code on the plain engine's layout, so
an error that all layouts share shows in the tests of its rooms, not here.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.config.artifacts import artifacts_of, resolved, without_names
from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig
from shardwise.data.stand_ins import STAND_INS
from shardwise.errors import UserError
from shardwise.parallel.layout import parse_layout, world_of
from shardwise.rewards.problem_files import write_stand_in
from shardwise.stages.pretrain_config import PretrainConfig
from shardwise.stages.run import run_rank
from shardwise.verify.compare import Difference
from shardwise.verify.pool import RankError, RankPool
from shardwise.verify.shrink import shrink, sizes
from shardwise.verify.verdict import Verdict

BOUND = 1e-9  # of a number's size, see design decision 4
TIMEOUT_S = 300.0
MAX_SEQ_LEN = 256  # a prompt in bytes, and an answer
SINGLE = "dp1"


def check_job(run: RunConfig, job: JobConfig, layout: str, pool: RankPool) -> list[Verdict]:
    """One verdict for each way that the job may draw: sampled, and greedy where it can be."""
    return [_check(run, variant, what, layout, pool) for what, variant in _variants(job)]


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
    yield "greedy", greedy


def _check(run: RunConfig, job: JobConfig, what: str, layout: str, pool: RankPool) -> Verdict:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="shardwise-verify-") as name:
        folder = Path(name)
        small = _small(run, job, layout, folder)
        try:
            wanted = _written(pool, small, job.name, folder / "single", SINGLE)
            found = _written(pool, small, job.name, folder / "ranks", layout)
        except (RankError, TimeoutError) as error:
            problem = str(error).splitlines()[0]
            seconds = time.perf_counter() - began
            return Verdict(job.name, layout, "fp64", {}, seconds, problem=problem)
    differences = list(compare_rows(wanted, found))
    worst = max((d.ratio for d in differences), default=0.0)
    return Verdict(
        job.name,
        layout,
        "fp64",
        {f"{what} rows".strip(): worst},
        time.perf_counter() - began,
        next((d for d in differences if d.is_bug), None),
        suspect=layout if any(d.is_bug for d in differences) else "",
        counts={"rows": sum(map(len, wanted.values()))},
    )


def _small(run: RunConfig, job: JobConfig, layout: str, folder: Path) -> dict[str, Any]:
    """The recipe of one job on a small model, with the stages whose models it asks for."""
    parsed = parse_layout(layout, world_of(layout))
    stand_in = PretrainConfig(kind="pretrain", name=job.name, steps=1, engine=job.engine)
    small = sizes(run, stand_in, [parsed])
    made = _fed(run, job, folder).shrunk(small.stage, folder)
    said = made.model_dump(mode="json")
    said.pop("start_from")
    said["engine"] |= {"precision": "fp64", "compile": False, "device": "cpu"}
    scorer = said.get("scorer") or {}
    earlier = [s.name for s in run.training if s.name == scorer.get("model")]
    stages = [shrink(run, name, [parsed], folder).recipe["stages"][0] for name in earlier]
    recipe = run.model_dump(mode="json", include={"seed", "engine"})
    return recipe | {
        "model": small.model.model_dump(mode="json") | {"max_seq_len": MAX_SEQ_LEN},
        "tokenizer": {"kind": "bytes"},
        "stages": [*stages, said],
    }


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


def _written(
    pool: RankPool, recipe: Mapping[str, Any], job: str, folder: Path, layout: str
) -> dict[str, list[Any]]:
    """The rows of every artifact, as the ranks of a layout write them."""
    stages = [
        {**s, "engine": {**s["engine"], "layout": layout if s["name"] == job else "auto"}}
        for s in recipe["stages"]
    ]
    config = {**recipe, "stages": stages, "run_dir": str(folder)}
    pool.run(_run, config, world=world_of(layout), timeout=TIMEOUT_S)
    files = sorted((folder / "stages" / job / "artifacts").glob("*.jsonl"))
    found = {f.stem: [json.loads(line) for line in f.read_bytes().splitlines()] for f in files}
    shutil.rmtree(folder)
    return found


def _run(config: dict[str, Any]) -> None:
    """In a rank."""
    run_rank(load_config(config))


def compare_rows(
    wanted: Mapping[str, Sequence[Any]], found: Mapping[str, Sequence[Any]]
) -> Iterator[Difference]:
    """What of a job's rows is not what one process wrote, in their order; numbers always."""
    for name in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(name, []), found.get(name, [])
        if len(one) != len(other):
            yield _unlike(name, f"{len(other)} rows, one process writes {len(one)}")
        for number, (a, b) in enumerate(zip(one, other)):
            yield from _compare(f"{name} row {number}", a, b)


def _compare(place: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _compare(f"{place}, {key}", a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            yield from _compare(f"{place} {i}", x, y)
    elif isinstance(a, float) and isinstance(b, float) and math.isfinite(a):
        error, bound = abs(a - b), BOUND * max(abs(a), 1.0)
        yield Difference("rows", place, error / bound, error, bound)
    elif a != b or type(a) is not type(b):
        yield _unlike(place, f"{_short(b)}, one process writes {_short(a)}")


def _unlike(place: str, why: str) -> Difference:
    return Difference("rows", place, math.inf, math.inf, 0.0, why=why)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
