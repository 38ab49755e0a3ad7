"""How a stage or an evaluation declares what it logs.

A declaration says everything that anybody needs to know of a metric: progress, report, diagnosis
and sweep read it, and know no name by themselves. It stands beside the config class, without torch;
`shardwise.metrics.declared` looks it up for a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """A rule of the diagnosis that watches a metric.

    ``name`` is a function of `shardwise.report.diagnosis`, or of another package as
    ``"module:function"``. It is given the metric's curve, and those of ``curves`` (its keywords, to
    names of metrics; empty where not logged). It is not asked where ``unless`` is logged.
    """

    name: str
    curves: Mapping[str, str] = field(default_factory=dict)
    unless: str = ""


@dataclass(frozen=True)
class Plot:
    """A chart; metrics of one stage that name the same one are drawn together.

    ``group`` is the heading that it stands under. ``across``: all stages on one axis of steps.
    ``log``: a logarithmic axis, where all values are above 0. ``exact``: no running mean.
    """

    title: str
    group: str
    across: bool = False
    log: bool = False
    exact: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Metric:
    """What is known of a metric by its name in metrics.jsonl.

    ``better``: None where neither direction is. ``format``: of `format`, or ``short`` for 1.2k.
    ``line``: its label in a line of progress; empty: it is not shown there. ``figure``: its newest
    value is told when the stage ends. ``plot``: None for a small curve.

    ``of_machine``: two runs of one computation need not share it, even if their steps take equally
    long.

    For what is measured after a stage: ``summary`` is its place in summary.json, ``first`` for one
    value of the run (of the first stage that has it) and ``stages`` for a table of all;
    ``count`` names the metric that says how many trials a share is of, ``references`` those that it
    is held against, ``source`` a text beside it that says what it was measured on.
    """

    name: str
    label: str
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    format: str = ".4g"
    line: str = ""
    figure: bool = False
    rules: tuple[Rule, ...] = ()
    plot: Plot | None = None
    of_machine: bool = False
    summary: Literal["", "first", "stages"] = ""
    count: str = ""
    references: tuple[str, ...] = ()
    source: str = ""

    def validated(self) -> Metric:
        """The same on data that is not trained on, drawn beside it."""
        return replace(self, name=f"val_{self.name}", label=f"validation {self.label}", rules=())


_LOSS = Plot("Loss", "Loss")
LOSS = Metric(
    "loss",
    "training loss",
    "nats per token",
    better="lower",
    line="loss",
    figure=True,
    plot=_LOSS,
    rules=(
        Rule("nonfinite", {"grad_norm": "grad_norm"}),
        Rule("never_falls"),
        Rule("spikes"),
        Rule("oscillates"),
        Rule("stalls", {"lr": "lr"}),
    ),
)
VAL_LOSS = Metric(
    "val_loss",
    "validation loss",
    "nats per token",
    better="lower",
    line="val loss",
    figure=True,
    plot=_LOSS,
    rules=(Rule("overfits", {"train": "loss"}),),
)
_FP8 = Rule("fp8_sound", {n: f"fp8_{n}" for n in ("underflow", "overflow", "fallbacks")})

# What the loop logs of every stage.
EVERY_STAGE = (
    LOSS,
    VAL_LOSS,
    Metric(
        "grad_norm",
        "gradient norm",
        "L2 norm",
        format=".3g",
        line="grad",
        plot=Plot("Gradient norm", "Optimizer", across=True, log=True),
    ),
    Metric(
        "lr",
        "learning rate",
        plot=Plot("Learning rate", "Optimizer", across=True, exact=True),
    ),
    Metric("tokens", "tokens of a step", "tokens", format="short"),
    Metric(
        "tokens_per_second",
        "throughput",
        "tokens per second",
        better="higher",
        format="short",
        line="tok/s",
        plot=Plot("Throughput", "Speed", across=True),
        summary="first",
    ),
    Metric("model_tflops", "model TFLOP/s", "TFLOP/s", better="higher"),
    Metric(
        "fraction_of_gemm",
        "fraction of the machine's GEMM rate",
        better="higher",
        format=".2f",
        plot=Plot("Fraction of the machine's GEMM rate", "Speed", across=True),
        summary="first",
    ),
    Metric(
        "memory_gb",
        "memory",
        "GB, peak of rank 0",
        better="lower",
        plot=Plot("Memory", "Speed", across=True),
        of_machine=True,
    ),
    Metric("rss_gb", "resident memory", "GB", better="lower", of_machine=True),
    Metric("cuda_reserved_gb", "memory reserved by CUDA", "GB", better="lower", of_machine=True),
    Metric("step_seconds", "time of a step", "seconds", better="lower", of_machine=True),
    # The worst layer of each look of the sentinel; the page has a table of all layers.
    Metric(
        "fp8_error",
        "error of the FP8 products",
        "share of the product's norm",
        better="lower",
        rules=(_FP8,),
        plot=Plot("Error of the FP8 products", "FP8", across=True),
    ),
    Metric(
        "fp8_drift",
        "drift of the amaxes",
        "log2 since the last look",
        plot=Plot("Drift of the amaxes", "FP8", across=True),
    ),
    Metric(
        "fp8_underflow",
        "underflow",
        "share of the elements",
        better="lower",
        plot=Plot("Underflow", "FP8", across=True),
    ),
    Metric(
        "fp8_overflow",
        "overflow",
        "share of the elements",
        better="lower",
        plot=Plot("Overflow", "FP8", across=True),
    ),
)


class Logs:
    """What a config class says of the metrics that its stage or evaluation logs."""

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """In the order of a line of progress; a later one of the same name takes its place."""
        return ()

    @classmethod
    def best(cls) -> Metric | None:
        """The metric, one of `metrics` with a direction, that says which of two models is better.

        Where `Stage.validate` gives it, the best checkpoint is chosen by it.
        """
        return None


class StageLogs(Logs):
    """The same of a stage."""

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """A stage adds its own to ``super().metrics()``, which every stage has."""
        return EVERY_STAGE

    @classmethod
    def best(cls) -> Metric | None:
        """See `Logs.best`."""
        return VAL_LOSS
