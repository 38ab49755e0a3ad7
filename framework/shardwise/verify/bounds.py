"""Bounds, derived (design decision 4): how far two computations of the same thing may differ."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

from shardwise.config.optimizers import OptimizerConfig
from shardwise.verify.notes import Noted, Reference
from shardwise.verify.undecided import UPDATE, undecided

EXACT_BOUND = 1e-9  # of a tensor's norm, in fp64
ROUNDING_FACTOR = 8.0  # times what one process loses in the same precision
# Rollouts are served in fp32 at most, and not by the model itself, which the reference is.
SERVED_BOUND = 64.0 * 2.0**-23
# A tensor whose true value is zero (the gradient of a key's bias, to which a softmax is blind) is
# rounding noise of its kind's scale: below this fraction of the norm of all tensors of the kind,
# nothing is compared.
NOISE = 1e-12
EPSILON = {
    "fp64": 2.0**-52,
    "fp32": 2.0**-23,
    "bf16": 2.0**-7,
    "fp16": 2.0**-10,
}
# What weights that went another way move: at once, and by name.
MOVED = ("gradient", "clip norm", "moment")
MOVED_WITH = frozenset((*MOVED, "weight", "metric", "initial", "loaded"))
# Equal to the last bit in every precision: nothing is computed on the way.
EXACT = frozenset(("rollout", "question", "sample", "learning rate", "skipped", "moved", "event"))
# Rounding differently, two layouts may see amaxes that differ by a rounding, one element more or
# less that underflows, and another of two equally likely tokens: those are for fp64 to compare.
ROUNDED_AWAY = frozenset(
    (
        "sentinel",
        "event",
        "external",
        "stored rollout",
        "sent weights",
        "resumed weight",
        "resumed moment",
        "resumed number",
        "state",
        "generated tokens",
        "generated logprobs",
        "evaluation",
    )
)

# Figures that count elements beyond a threshold, which rounding moves one across.
COUNTED = ("_fraction", "accuracy", "calibration_error")


def is_rounded_away(name: str) -> bool:
    """Whether only fp64 can tell: see `ROUNDED_AWAY` and `COUNTED`."""
    return kind_of(name) in ROUNDED_AWAY or name.endswith(COUNTED)


def kind_of(name: str) -> str:
    """The kind of a noted value: what stands before the first slash."""
    return name.partition("/")[0]


def like(name: str) -> str:
    """A value's name without its numbers."""
    return re.sub(r"\d+", "#", name)


def losses(found: Mapping[str, Sequence[Noted]]) -> dict[str, float]:
    """How far one process in a working precision is from fp64: the largest gap among like values.

    How much it loses of a value is one draw, by luck nothing at all; alike are values whose names
    differ in numbers alone (of updates, of layers).
    """
    lost: dict[str, float] = {}
    for name, parts in found.items():
        gap = math.sqrt(sum(p.square for p in parts))
        lost[like(name)] = max(gap, lost.get(like(name), 0.0))
    return lost


def bounds(
    reference: Reference,
    lost: Mapping[str, float] | None,
    precision: str,
    optimizers: Mapping[str, OptimizerConfig] | None = None,
) -> dict[str, float]:
    """For every value, how far (2-norm) a layout in ``precision`` may be from the reference (fp64).

    ``lost`` (`losses`) is what one process loses in that precision; None for fp64.
    ``optimizers``: by role ("" where there is one model).
    """
    exact, norms = reference.values, reference.norms
    scale: dict[str, float] = {}
    for name, norm in norms.items():
        scale[kind_of(name)] = math.hypot(scale.get(kind_of(name), 0.0), norm)
    scale["loss"] = max(1.0, scale.get("loss", 0.0))
    found = {}
    for name, norm in norms.items():
        kind, floor = kind_of(name), NOISE * scale[kind_of(name)]
        if kind in EXACT:
            found[name] = 0.0
        elif kind in ("initial", "loaded", "generated tokens"):
            # Rounded from the same numbers by every layout alike.
            found[name] = 0.0 if lost is None else lost[like(name)] * (1 + 1e-6)
        elif lost is None:
            served = kind in ("external", "generated logprobs")
            found[name] = (SERVED_BOUND if served else EXACT_BOUND) * norm + floor
        else:
            rounding = ROUNDING_FACTOR * lost.get(like(name), 0.0)
            # A single number may lose nothing by luck, however often it is drawn.
            least = EPSILON[precision] * (1.0 if exact[name].dim() else ROUNDING_FACTOR)
            # Terms of about one may cancel out: a policy's loss where no ratio has moved.
            whole = max(norm, 1.0 / ROUNDING_FACTOR) if kind == "loss" else norm
            found[name] = max(rounding, least * whole) + floor
    blind = _blind(reference)
    if lost is not None:
        _leave_noise(reference, found, blind, EPSILON[precision])
    if optimizers:
        _widen(reference, found, optimizers, blind, rounds=lost is not None)
    for name in found:
        if kind_of(name) == "logged" and lost is not None:
            found[name] = max(found[name], *_parts_of(name, found), 0.0)
    return found


def _blind(reference: Reference) -> set[tuple[str, str]]:
    """Parameters, by role and name, that what is learnt is blind to: no gradient is above noise."""
    norms = {name: n for name, n in reference.norms.items() if kind_of(name) == "gradient"}
    noise = NOISE * math.hypot(*norms.values())
    seen = {_parameter(name) for name, norm in norms.items() if norm > noise}
    return {_parameter(name) for name in norms} - seen


def _parameter(name: str) -> tuple[str, str]:
    match = UPDATE.fullmatch(name.partition("/")[2])
    assert match is not None
    return match[1] or "", match[3]


def _leave_noise(
    reference: Reference, found: dict[str, float], blind: set[tuple[str, str]], epsilon: float
) -> None:
    """Widen, in place, bounds of gradients that are zero in truth, and of what is made of them.

    Their terms cancel out. One process may round all of them alike and lose nothing, where ranks
    round sums of some; of what these are, a fraction of all gradients' norm is the measure.
    """
    whole: dict[tuple[str, ...], float] = {}
    groups: dict[str, tuple[str, ...]] = {}
    noise = []
    for name, norm in reference.norms.items():
        kind = kind_of(name)
        if kind not in ("gradient", "moment"):
            continue
        role, of = _parameter(name)
        of, _, state = of.partition(" ")
        groups[name] = group = (kind, role, state)
        whole[group] = math.hypot(whole.get(group, 0.0), norm)
        noise += [name] if (role, of) in blind else []
    for name in noise:
        found[name] = max(found[name], epsilon * whole[groups[name]])


_LATER = re.compile(r"[^/]+/(?:(\w+) )?(?:step|update) (?!1\b)")


def _widen(
    reference: Reference,
    found: dict[str, float],
    optimizers: Mapping[str, OptimizerConfig],
    blind: set[tuple[str, str]],
    rounds: bool,
) -> None:
    """Add to bounds, in place, what rounding decides of the weights, see `undecided`.

    Weights that went another way are in the next update's figures, gradients and moments: by no
    larger a share of those than the weights are apart. ``rounds``: not fp64.
    """
    of_update: dict[tuple[str, int], dict[str, list[str]]] = {}
    for name in reference.values:
        kind, _, what = name.partition("/")
        if match := UPDATE.fullmatch(f"{what} "):
            kinds = of_update.setdefault((match.group(1) or "", int(match.group(2))), {})
            kinds.setdefault(kind, []).append(name)
    apart: dict[str, float] = {}  # by role, 2-norm of all weights
    every: dict[tuple[str, int], float] = {}
    felt: dict[tuple[str, int], float] = {}  # of weights that what is learnt is not blind to
    before: dict[str, float] = {}  # of an adapter: one factor's gradient is as large as the other
    for (role, update), kinds in sorted(of_update.items()):
        share = felt.get((role, update - 1), 0.0)
        for name in itertools.chain(*(kinds.get(k, ()) for k in MOVED)):
            own = before.get(f"{role} {update - 1} {_adapter_of(name)}", 0.0)
            found[name] += max(share, own) * reference.norms[name]
        # A figure may cancel out: that of all scores, to which a ranking is blind.
        figures = kinds.get("metric", ())
        whole = math.hypot(*(reference.norms[name] for name in figures))
        for name in figures:
            found[name] += every.get((role, update - 1), 0.0) * whole
        slacks, whole = dict[str, float](), 0.0
        for name in kinds.get("weight", ()):
            adapter, norm = f"{role} {update} {_adapter_of(name)}", reference.norms[name]
            what = name.partition("/")[2]
            is_blind = _parameter(name) in blind
            slacks[name] = slack = undecided(what, reference.values, found, optimizers, is_blind)
            found[name] += slack
            if (z := f"moment/{what} z") in found:  # which the weight is an average of
                found[z] += slack
            if _adapter_of(name) and norm:
                before[adapter] = max(before.get(adapter, 0.0), min(1.0, slack / norm))
            whole = math.hypot(whole, norm)
        seen = math.hypot(*(v for name, v in slacks.items() if _parameter(name) not in blind))
        apart[role] = max(apart.get(role, 0.0), math.hypot(*slacks.values()))
        every[role, update] = min(1.0, math.hypot(*slacks.values()) / whole) if whole else 0.0
        felt[role, update] = min(1.0, seen / whole) if whole else 0.0
    _widen_later(reference, found, every, max(felt.values(), default=0.0) if rounds else None)
    for name in reference.values:
        if kind_of(name) == "sent weights" and (match := _LATER.match(name)):
            found[name] += apart.get(match[1] or "", 0.0)


def _widen_later(
    reference: Reference,
    found: dict[str, float],
    every: Mapping[tuple[str, int], float],
    felt: float | None,
) -> None:
    """Add to bounds, in place, what weights that went another way move in later steps.

    ``every``: shares by role and update; ``felt``: the largest, by which all moves that a stage
    computes of its passes (values, advantages, losses); None in fp64, where that is not asked for.
    """
    for name, norm in reference.norms.items():
        match, kind = _LATER.match(name), kind_of(name)
        if match is None or kind in MOVED_WITH or kind in EXACT:
            continue
        if kind in ("forward pass", "logged"):
            whose = match[1] or ""
            anyone = felt is not None and not whose
            shares = (share for (role, _), share in every.items() if anyone or role == whose)
            found[name] += max(shares, default=0.0) * norm
        else:
            found[name] += (felt or 0.0) * norm


def _adapter_of(name: str) -> str:
    """The module whose adapter has this parameter; "" for others."""
    path, mark, _ = name.partition(".adapter.")
    return path.rpartition(" ")[2] if mark else ""


def _parts_of(name: str, found: Mapping[str, float]) -> list[float]:
    """Bounds of the figures of updates that a logged one is a mean of."""
    figure = name.rpartition(" ")[2]
    kind = {"loss": "loss", "grad_norm": "clip norm"}.get(figure)
    return [
        bound
        for other, bound in found.items()
        if kind_of(other) == kind or (kind_of(other) == "metric" and other.endswith(f" {figure}"))
    ]
