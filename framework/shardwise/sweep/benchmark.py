"""`sweep --benchmark`: throughput and memory of the points of a sweep, timed in turns.

Each turn of a point is a short run of one stage in a process of its own, on all cores (or GPUs).
Turns go A B C, A B C; a turn waits for a quiet machine, its first steps do not count, and what
other processes burnt during it stands beside the figure (`shardwise.metrics.timing`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.config import overrides as override_room
from shardwise.config import yaml12
from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.metrics import timing
from shardwise.metrics.progress import number
from shardwise.report.rundata import RunData
from shardwise.report.series import EMPTY, Series
from shardwise.storage.durable import write_durably
from shardwise.sweep.config import ObjectiveConfig, OptunaConfig, SlotsConfig, SweepConfig
from shardwise.sweep.objective import Objective
from shardwise.sweep.plan import Plan
from shardwise.sweep.process import Running
from shardwise.sweep.results import Result
from shardwise.sweep.run import Sweep
from shardwise.sweep.table import shown
from shardwise.sweep.trial import Trial, name_of, override_words

TURN_FILE = "turn.json"


@dataclasses.dataclass(frozen=True)
class Throughput(Objective):
    """Tokens per second of the steps behind the warm-up."""

    warmup: int = 0

    def series(self, run: RunData) -> Series:
        """Of each step that counts."""
        tokens, seconds = run.get(self.stage, "tokens"), run.get(self.stage, "step_seconds")
        counted = seconds.steps > self.warmup
        if len(tokens) != len(seconds):
            return EMPTY
        rates = tokens.values[counted] / seconds.values[counted]
        return Series(seconds.steps[counted], rates)

    def reached(self, run: RunData) -> float | None:
        """Over all of them: tokens over seconds."""
        rates = self.series(run)
        return len(rates) / sum(1 / rates.values) if len(rates) else None


def benchmark_of(config: SweepConfig) -> SweepConfig:
    """The sweep that times the points of ``config``: short runs of the objective's stage.

    Raises ConfigError for a sampler, which wants one figure at a time.
    """
    if isinstance(config.method, OptunaConfig):
        raise ConfigError("method.kind: optuna; a benchmark takes turns: use grid, list or random")
    said = config.benchmark
    loaded = load_config(config.recipe, override_words(config.overrides)).config
    names = [stage.name for stage in loaded.stages]
    name = config.objective.stage or names[-1]
    if name not in names:
        raise ConfigError(f"objective.stage: there is no {name!r}; stages: {', '.join(names)}")
    tree = yaml12.parse(safe_files.read_text(config.recipe), str(config.recipe))
    override_room.apply(tree, override_words(config.overrides))
    stage = dict(tree.data["stages"][names.index(name)])
    for key in ("schedule", "checkpoint", "start_from"):
        stage.pop(key, None)
    stage |= {"steps": said.warmup + said.steps, "validation": {"max_batches": 1}}
    overrides = {k: v for k, v in config.overrides.items() if not k.startswith("stages")}
    overrides |= {"stages": [stage], "evaluations": [], "logging.every": 1}
    return config.model_copy(
        update={
            "sweep_dir": config.directory / "benchmark",
            "overrides": overrides,
            "repeats": said.turns,
            "objective": ObjectiveConfig(stage=name, metric="tokens_per_second"),
            "slots": SlotsConfig(number=1, gpus=config.slots.gpus),
            "pruner": None,
        }
    )


def throughput(plan: Plan) -> Plan:
    """The same plan, judged by the steps that count."""
    old = plan.objective
    said = plan.config.benchmark
    new = Throughput(old.stage, old.metric, old.better, old.take, said.warmup)
    return dataclasses.replace(plan, objective=new)


class Benchmark(Sweep):
    """Turns, one after the other, on a machine that is watched."""

    def _start(self, trial: Trial) -> None:
        said = self.config.benchmark
        before = timing.wait_for_quiet(said.max_others, said.wait_s)
        if before > said.max_others:
            self.say(f"{trial.name} starts on a busy machine: others burn {before:.2f} cores")
        self.neighbours = timing.Neighbours()
        self.neighbours.begin()
        super()._start(trial)

    def _tell(self, one: Running) -> None:
        self.neighbours.end(one.seconds, one.burnt or 0.0)
        others = self.neighbours.cores
        record = {"others": None if math.isnan(others) else others, "load": timing.load()}
        write_durably(one.trial.folder / TURN_FILE, json.dumps(record).encode())
        super()._tell(one)


def measured(plan: Plan, results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each point, the fastest first.

    ``tokens_per_second``: median over turns. ``ratio``: to the first point of the sweep, the median
    within turns. ``memory_gb``: the peak of rank 0, most of its turns. ``others``: cores that other
    processes burnt, most of its turns; ``quiet``: whether that is below what the sweep allows.
    """
    by_number: dict[int, list[Result]] = {}
    for result in results:
        by_number.setdefault(result.number, []).append(result)
    laps = timing.Laps()
    for num, several in by_number.items():
        for result in several:
            laps.add(str(num), 1 / result.value if result.value else math.nan)
    rows = []
    first = str(min(by_number))
    for num, several in by_number.items():
        values = [r.value for r in several if r.value]
        if not values:
            continue
        others = [_others(plan.directory / "trials" / r.name) for r in several if r.value]
        known = [o for o in others if o is not None]
        whole = all(r.value for r in (*several, *by_number[int(first)]))
        comparable = whole and len(several) == len(by_number[int(first)])
        rows.append(
            {
                "number": num,
                "point": several[0].point,
                "turns": len(values),
                "tokens_per_second": statistics.median(values),
                "ratio": laps.ratio(str(num), first) if comparable else None,
                "memory_gb": max((r.memory_gb for r in several if r.memory_gb), default=None),
                "others": max(known) if known else None,
                "quiet": bool(known) and max(known) <= plan.config.benchmark.max_others,
            }
        )
    return sorted(rows, key=lambda row: -row["tokens_per_second"])


def measured_text(rows: Sequence[dict[str, Any]]) -> str:
    """The same as Markdown."""
    head = ("trial", "point", "tok/s", "ratio", "GB", "others", "")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            name_of(row["number"], 0),
            shown(row["point"]),
            number(row["tokens_per_second"]),
            "" if row["ratio"] is None else f"{row['ratio']:.3f}",
            "" if row["memory_gb"] is None else f"{row['memory_gb']:.2f}",
            "" if row["others"] is None else f"{row['others']:.2f}",
            "" if row["quiet"] else "busy machine",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _others(folder: Path) -> float | None:
    try:
        found = safe_files.parse_json(safe_files.read_bytes(folder / TURN_FILE))
    except (OSError, ValueError):
        return None
    said = found.get("others") if isinstance(found, dict) else None
    return float(said) if isinstance(said, int | float) else None
