"""Which layouts can be right for a model, a batch and an engine: one table, asked before any start.

Each row is a reason to refuse, with the numbers. `check` adds the nearest layout that every row
lets pass, on the same ranks, and that computes the same training (`nearest`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

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
    fused: str = ""  # an optimizer's kind that moves weights in the backward pass
    max_grad_norm: float = 0.0

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a data rank in a step."""
        share = -(-self.global_batch // self.layout.dp)
        return -(-share // self.micro_batch)


def _heads(case: Case) -> str | None:
    n, tp = case.model.num_heads, case.layout.tp
    if n % tp == 0:
        return None
    return f"tp{tp} does not divide num_heads {n}"


def _kv_heads(case: Case) -> str | None:
    g, tp = case.model.kv_heads, case.layout.tp
    if g % tp == 0 or tp % g == 0:
        return None
    return f"tp{tp} neither divides nor is a multiple of num_kv_heads {g}"


def _ulysses_heads(case: Case) -> str | None:
    layout = case.layout
    heads = case.model.num_heads // layout.tp
    if layout.cp == 1 or layout.cp_kind != "ulysses" or heads % layout.cp == 0:
        return None
    return (
        f"ulysses gives each of cp{layout.cp} ranks some of the {heads} heads of a tp rank, and "
        f"{layout.cp} does not divide {heads}"
    )


def _layers(case: Case) -> str | None:
    chunks, n = case.layout.num_chunks, case.model.num_layers
    if chunks <= n:
        return None
    layout = case.layout
    return f"{chunks} pipeline stages (pp{layout.pp} x {layout.virtual}) but num_layers {n}"


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
            "into them"
        )
    if layout.schedule == "dualpipev":
        least = 2 * layout.pp
    if n >= least:
        return None
    return (
        f"{layout.schedule} on pp{layout.pp} needs at least {least} micro-batches of a data rank, "
        f"and there are {n} (global_batch {case.global_batch}, micro_batch {case.micro_batch})"
    )


def _compile_split(case: Case) -> str | None:
    layout = case.layout
    if layout.pp == 1 or layout.schedule not in SPLIT_BACKWARD or not case.compiled:
        return None
    return (
        f"{layout.schedule} computes gradients of weights apart, which a compiled block cannot; "
        "set engine.compile=false"
    )


# --- optimizers that move weights in the backward pass --------------------------------------------


def _fused_pipeline(case: Case) -> str | None:
    if not case.fused or case.layout.pp == 1:
        return None
    return f"optimizer.kind: {case.fused} moves weights in one backward pass, and pp has many"


def _fused_batches(case: Case) -> str | None:
    if not case.fused or case.num_microbatches == 1:
        return None
    share = -(-case.global_batch // case.layout.dp)
    return (
        f"optimizer.kind: {case.fused} moves weights in the backward pass of one micro-batch, and "
        f"there are {case.num_microbatches}; set batch.micro_batch to {share}"
    )


def _fused_clipping(case: Case) -> str | None:
    if not case.fused or case.max_grad_norm == 0:
        return None
    return (
        f"engine.max_grad_norm: {case.max_grad_norm:g} asks for all gradients before a weight "
        f"moves, and optimizer.kind {case.fused} keeps none; set 0"
    )


def _fused_scaling(case: Case) -> str | None:
    if not case.fused or case.precision != "fp16":
        return None
    return (
        "engine.precision: fp16 leaves updates out whose scaled gradients overflow, and "
        f"optimizer.kind {case.fused} has moved weights by then; use bf16 or fp32"
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
                    "engine.fp8.modules"
                )
    return None


# Every row is a test (tests/parallel/test_feasible.py).
_OF_LAYOUT: tuple[Callable[[Case], str | None], ...] = (
    _heads,
    _kv_heads,
    _ulysses_heads,
    _layers,
    _pipeline_batches,
    _compile_split,
    _fused_pipeline,
    _fused_batches,
)
_OF_ENGINE: tuple[Callable[[Case], str | None], ...] = (_fused_clipping, _fused_scaling)
# Of a layout they ask what is scaled together and how many ranks there are, no more.
_OF_FP8: tuple[Callable[[Case], str | None], ...] = (
    _fp8_precision,
    _fp8_compile,
    _fp8_modules,
    _fp8_widths,
)
REFUSALS = _OF_LAYOUT + _OF_ENGINE + _OF_FP8


def refusal(case: Case) -> str | None:
    """The first reason why a case cannot be computed rightly, with its key; None without one."""
    for row in REFUSALS:
        if reason := row(case):
            key = (
                ""
                if reason.startswith(("engine.", "optimizer."))
                else f"engine.layout: {case.layout}: "
            )
            return key + reason
    return None


def check(*cases: Case) -> None:
    """Raise ConfigError if one of ``cases`` cannot be computed rightly: the reason and the nearest.

    The cases are of one layout: a stage with every batch size that it comes to.
    """
    for case in cases:
        if reason := refusal(case):
            own = ("engine.fp8", "engine.max_grad_norm", "optimizer.kind")
            raise ConfigError(reason + ("" if reason.startswith(own) else offer(cases)))


def offer(cases: Sequence[Case], world: int | None = None) -> str:
    """The nearest layout in words, to be added to a reason; see `nearest`."""
    ranks = world or cases[0].layout.world
    near = nearest(cases, ranks)
    if near is None:
        return f"; no layout of {ranks} rank{'s' if ranks > 1 else ''} computes the same training"
    return f"; nearest: engine.layout={near}"


def nearest(cases: Sequence[Case], world: int) -> Layout | None:
    """The layout of ``world`` ranks, nearest to that of ``cases``, that may stand in its place.

    No row refuses it, for any of the cases, and it computes the same training: the same global
    batch in as many micro-batches of the same size, under the same model and optimizer; with FP8,
    scaled in the same domains, too. Near means: the same data ranks if at all possible, then the
    fewest axes changed, then the least.
    """
    wanted = cases[0].layout
    for layout in sorted(_layouts_of(world, wanted), key=lambda x: _distance(wanted, x)):
        moved = [dataclasses.replace(case, layout=layout) for case in cases]
        same = all(map(_same_training, cases, moved))
        if same and not any(row(case) for row in _OF_LAYOUT for case in moved):
            # What FP8 refuses here, it refuses in all layouts that are left.
            return None if any(map(refusal, moved)) else layout
    return None


def _same_training(a: Case, b: Case) -> bool:
    """Whether micro-batches hold the same samples and, with FP8, are scaled alike."""
    if a.fp8 is not None and _domains(a.layout) != _domains(b.layout):
        return False
    if a.layout.dp == b.layout.dp:
        return True
    # Else rows would be cut, or filled up, in other places.
    return all(c.global_batch % (c.layout.dp * c.micro_batch) == 0 for c in (a, b))


def _domains(layout: Layout) -> tuple[int, int, str]:
    return layout.tp, layout.cp, layout.cp_kind if layout.cp > 1 else ""


def _layouts_of(world: int, like: Layout) -> Iterator[Layout]:
    """Every layout of ``world`` ranks with the ZeRO stage of ``like``."""
    for tp, pp, cp in itertools.product(_divisors(world), repeat=3):
        if world % (tp * pp * cp):
            continue
        dp = world // (tp * pp * cp)
        shard = nearest_divisor(dp, like.shard) if like.zero and like.shard != like.dp else dp
        schedules = {("1f1b", 1)}
        if pp > 1:
            schedules |= {(like.schedule, like.virtual)} if like.pp > 1 else set()
            schedules |= {("interleaved", v) for v in (2, 3, 4)}
        for (schedule, virtual), kind in itertools.product(
            sorted(schedules), sorted({like.cp_kind, "ring"}) if cp > 1 else ("ring",)
        ):
            yield Layout(
                dp, shard if like.zero else 1, like.zero, tp, like.sp and tp > 1, pp, virtual,
                schedule, cp, kind,
            )  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _distance(a: Layout, b: Layout) -> tuple[bool, int, float, str]:
    axes = ("dp", "shard", "tp", "pp", "cp", "virtual")
    ratios = [abs(math.log2(getattr(b, x) / getattr(a, x))) for x in axes]
    names = [getattr(a, x) != getattr(b, x) for x in ("schedule", "cp_kind")]
    changed = sum(r > 0 for r in ratios) + sum(names)
    return a.dp != b.dp, changed, sum(ratios), str(b)
