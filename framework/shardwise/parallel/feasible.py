"""Which layouts can be right for a model, a batch and an engine: one table, asked before any start.

Each row is a reason to refuse, with the numbers and the nearest layout that works.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardwise.config.schema import Fp8Config
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.ops.fp8 import WIDTHS
from shardwise.parallel.layout import SPLIT_BACKWARD, Layout, nearest_divisor
from shardwise.parallel.quantised import quantised_linears


@dataclasses.dataclass(frozen=True)
class Case:
    """What a stage asks of a layout."""

    layout: Layout
    model: DecoderConfig
    compiled: bool
    global_batch: int
    micro_batch: int
    precision: str = "bf16"
    fp8: Fp8Config | None = None

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a data rank in a step."""
        share = -(-self.global_batch // self.layout.dp)
        return -(-share // self.micro_batch)


def _change(layout: Layout, **fields: object) -> str:
    return str(dataclasses.replace(layout, **fields))  # type: ignore[arg-type]


def _with_tp(layout: Layout, number: int) -> str:
    near = nearest_divisor(number, layout.tp)
    return _change(layout, tp=near, sp=layout.sp and near > 1)


def _heads(case: Case) -> str | None:
    n, tp = case.model.num_heads, case.layout.tp
    if n % tp == 0:
        return None
    return f"tp{tp} does not divide num_heads {n}; nearest: {_with_tp(case.layout, n)}"


def _kv_heads(case: Case) -> str | None:
    g, tp = case.model.kv_heads, case.layout.tp
    if g % tp == 0 or tp % g == 0:
        return None
    return (
        f"tp{tp} neither divides nor is a multiple of num_kv_heads {g}; "
        f"nearest: {_with_tp(case.layout, g)}"
    )


def _ulysses_heads(case: Case) -> str | None:
    layout = case.layout
    heads = case.model.num_heads // layout.tp
    if layout.cp == 1 or layout.cp_kind != "ulysses" or heads % layout.cp == 0:
        return None
    return (
        f"ulysses gives each of cp{layout.cp} ranks some of the {heads} heads of a tp rank, and "
        f"{layout.cp} does not divide {heads}; nearest: {_change(layout, cp_kind='ring')}"
    )


def _layers(case: Case) -> str | None:
    chunks, n = case.layout.num_chunks, case.model.num_layers
    if chunks <= n:
        return None
    pp = max(1, n // case.layout.virtual)
    return (
        f"{chunks} pipeline stages (pp{case.layout.pp} x {case.layout.virtual}) but "
        f"num_layers {n}; nearest: {_change(case.layout, pp=pp)}, or more layers"
    )


def _pipeline_batches(case: Case) -> str | None:
    layout, n = case.layout, case.num_microbatches
    if layout.pp == 1:
        return None
    least = 1
    if layout.schedule in ("interleaved", "interleavedzb"):
        # torch's tables work in rounds of micro-batches.
        rounds = max(1, n // layout.pp)
        if n % rounds == 0:
            return None
        return (
            f"{layout.schedule} works in {rounds} rounds, and {n} micro-batches of a data rank "
            f"(global_batch {case.global_batch}, micro_batch {case.micro_batch}) do not divide "
            f"into them; nearest: {_nearest_batches(case, n // rounds * rounds)}"
        )
    if layout.schedule == "dualpipev":
        least = 2 * layout.pp
    if n >= least:
        return None
    return (
        f"{layout.schedule} on pp{layout.pp} needs at least {least} micro-batches of a data rank, "
        f"and there are {n} (global_batch {case.global_batch}, micro_batch {case.micro_batch}); "
        f"nearest: {_nearest_batches(case, least)}, "
        f"or {_change(layout, schedule='1f1b', virtual=1)}"
    )


def _nearest_batches(case: Case, wanted: int) -> str:
    return f"global_batch {wanted * case.micro_batch * case.layout.dp}"


def _compile_split(case: Case) -> str | None:
    layout = case.layout
    if layout.pp == 1 or layout.schedule not in SPLIT_BACKWARD or not case.compiled:
        return None
    return (
        f"{layout.schedule} computes gradients of weights apart, which a compiled block cannot; "
        f"set engine.compile=false, or nearest: {_change(layout, schedule='interleaved')}"
    )


# --- FP8 ----------------------------------------------------------------------------------------


def _fp8_precision(case: Case) -> str | None:
    if case.fp8 is None or case.precision in ("auto", "bf16", "fp32"):
        return None
    why = "scales its loss itself" if case.precision == "fp16" else "has no 8-bit products"
    return f"engine.precision: {case.precision} {why}; with engine.fp8, use bf16 (or fp32)"


def _fp8_compile(case: Case) -> str | None:
    if case.fp8 is None or not case.compiled:
        return None
    return "engine.compile: true, but a compiled block cannot hold engine.fp8; use false or auto"


def _fp8_modules(case: Case) -> str | None:
    if case.fp8 is None or quantised_linears(case.model, case.fp8):
        return None
    first, last = case.fp8.first_layers, case.fp8.last_layers
    if first + last >= case.model.num_layers:
        return (
            f"engine.fp8.first_layers: {first} and last_layers {last} leave none of num_layers "
            f"{case.model.num_layers}; lower them"
        )
    return (
        f"engine.fp8.modules: no linear layer of a block matches {', '.join(case.fp8.modules)}; "
        'patterns are of whole paths, such as "layers.*.mlp.*"'
    )


def _fp8_widths(case: Case) -> str | None:
    """Tiles may not lie across ranks, nor be cut off; an FP8 product needs multiples of 16."""
    if case.fp8 is None:
        return None
    tp, recipe = case.layout.tp, case.fp8.recipe
    multiple = WIDTHS[recipe]
    for layer in quantised_linears(case.model, case.fp8):
        for what, width in zip(("out", "in"), layer.local(tp, case.model.kv_heads), strict=True):
            if width % multiple:
                rank = f" a rank of tp{tp}" if tp > 1 else ""
                return (
                    f"engine.fp8.recipe: {recipe} needs {what}put features in multiples of "
                    f"{multiple}, and {layer.path} has {width:g}{rank}; nearest: "
                    f"{max(1, round(width / multiple)) * multiple}, or leave it out by "
                    "engine.fp8.modules" + (", or a smaller tp" if tp > 1 else "")
                )
    return None


def _fp8_domains(case: Case) -> str | None:
    if case.fp8 is None or case.fp8.domains is None or case.layout.world == 1:
        return None
    return (
        f"engine.fp8.domains: {case.fp8.domains} would be emulated on one rank, and "
        f"{case.layout} has {case.layout.world}; leave it out, or use one rank"
    )


# Every row is a test (tests/parallel/test_feasible.py).
REFUSALS: tuple[Callable[[Case], str | None], ...] = (
    _heads,
    _kv_heads,
    _ulysses_heads,
    _layers,
    _pipeline_batches,
    _compile_split,
    _fp8_precision,
    _fp8_compile,
    _fp8_modules,
    _fp8_widths,
    _fp8_domains,
)


def check(case: Case) -> None:
    """Raise ConfigError with the first reason why ``case`` cannot be computed rightly."""
    for row in REFUSALS:
        if reason := row(case):
            key = "" if reason.startswith("engine.") else f"engine.layout: {case.layout}: "
            raise ConfigError(key + reason)
