"""Derived tolerance (design decision 4): how far two computations of the same thing may differ."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shardwise.checkpoint.regions import Region, contains
from shardwise.verify.replay import Parts, Replayed

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


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value of one layout: the norm of its error over the bound."""

    kind: str
    name: str
    ratio: float
    error: float
    bound: float
    worst: tuple[int, ...] = ()  # index of the element that is furthest off

    @property
    def is_bug(self) -> bool:
        """Whether rounding cannot explain it."""
        return not self.ratio <= 1.0  # NaN is a bug too


def kind_of(name: str) -> str:
    """The kind of a recorded value: what stands before the first slash."""
    return name.partition("/")[0]


def like(name: str) -> str:
    """A value's name without its numbers."""
    return re.sub(r"\d+", "#", name)


def bounds(
    exact: Mapping[str, Tensor], single: Mapping[str, Tensor] | None, precision: str
) -> dict[str, float]:
    """For every value, how far (2-norm) a layout in ``precision`` may be from ``exact`` (fp64).

    ``single`` is what one process computes in that precision; None for fp64. How much it loses of a
    value is one draw, by luck nothing at all: the largest loss among its like is taken, values
    whose names differ in numbers alone (of updates, of layers).
    """
    scale: dict[str, float] = {}
    for name, value in exact.items():
        kind = kind_of(name)
        scale[kind] = float((scale.get(kind, 0.0) ** 2 + value.norm() ** 2) ** 0.5)
    lost: dict[str, float] = {}
    if single is not None:
        for name, value in exact.items():
            gap = float((single[name] - value).norm())
            lost[like(name)] = max(gap, lost.get(like(name), 0.0))
    found = {}
    for name, value in exact.items():
        norm, floor = float(value.norm()), NOISE * scale[kind_of(name)]
        if kind_of(name) in ("initial", "generated tokens"):
            # Rounded from the same numbers by every layout alike.
            found[name] = 0.0 if single is None else float((single[name] - value).norm())
        elif single is None:
            served = kind_of(name) == "generated logprobs"
            found[name] = (SERVED_BOUND if served else EXACT_BOUND) * norm + floor
        else:
            rounding = ROUNDING_FACTOR * lost[like(name)]
            found[name] = max(rounding, EPSILON[precision] * norm) + floor
    if single is not None:
        for name in exact:
            if kind_of(name) == "weight":
                found[name] += undecided(name.partition("/")[2], exact, found)
    return found


def undecided(name: str, exact: Mapping[str, Tensor], limits: Mapping[str, float]) -> float:
    """How far a weight may be apart because Adam divides by the size of its gradient.

    An element moves by about the learning rate however small its gradient is. Where the first
    moment is within its own bound of zero, rounding decides which way: twice the furthest move.
    """
    key = f"moment/{name} exp_avg"
    if key not in exact or f"initial/{name}" not in exact:
        return 0.0
    moment, move = exact[key], exact[f"weight/{name}"] - exact[f"initial/{name}"]
    either = moment.abs() <= limits[key] / math.sqrt(max(1, moment.numel()))
    return 2.0 * float(move.abs().max()) * math.sqrt(int(either.sum()))


def full_values(ranks: Sequence[Replayed]) -> dict[str, Tensor]:
    """All values of a layout, each put together from the ranks' parts; NaN where nobody has one."""
    parts: dict[str, Parts] = {}
    found: dict[str, Tensor] = {}
    for replayed in ranks:
        for name, value in replayed.values.items():
            if isinstance(value, Tensor):
                found[name] = value
            else:
                parts.setdefault(name, []).extend(value)
                found.setdefault(name, torch.empty(0))  # in its place
    for name, regions in parts.items():
        ends = [[o + n for o, n in zip(*region)] for region, _ in regions]
        shape = tuple(map(max, zip(*ends))) if ends else (0,)
        found[name] = torch.full(shape, torch.nan, dtype=torch.float64)
        for region, part in regions:
            found[name][region.relative_to((0,) * len(shape))] = part
    return found


def compare(
    exact: Mapping[str, Tensor], limits: Mapping[str, float], values: Mapping[str, Tensor]
) -> list[Difference]:
    """Every value of a layout against the reference, in the order in which they came about."""
    found = []
    for name in exact:
        kind, rest = kind_of(name), name.partition("/")[2]
        if name not in values or values[name].shape != exact[name].shape:
            found.append(Difference(kind, rest, float("inf"), float("inf"), limits[name]))
            continue
        gap = values[name] - exact[name]
        error = float(gap.norm())
        ratio = 0.0 if error == 0.0 else error / limits[name] if limits[name] else float("inf")
        worst: tuple[int, ...] = ()
        if not ratio <= 1.0 and gap.dim():
            flat = int(gap.abs().nan_to_num(torch.inf).argmax())
            worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), gap.shape))
        found.append(Difference(kind, rest, ratio, error, limits[name], worst))
    return found


def compare_scales(single: Mapping[str, Tensor], ranks: Sequence[Replayed]) -> list[Difference]:
    """Amaxes, scales and histories of FP8, each bitwise equal to one process's.

    Every rank tells of its own parts; who holds the same part must hold the same numbers, and
    together the ranks hold all. A block of zeros (a query that sees one key) may be noise where a
    ring merges what its ranks found.
    """
    found = []
    for name in dict.fromkeys([*single, *(n for replayed in ranks for n in replayed.scales)]):
        held = [p.scales[name] for p in ranks if name in p.scales]
        kind, rest = kind_of(name), name.partition("/")[2]
        if name not in single or not held or any(h.shape != single[name].shape for h in held):
            found.append(Difference(kind, rest, float("inf"), float("inf"), 0.0))
            continue
        one = single[name]
        bits = [_without_noise(v, one) for v in (one, *held)]
        equal = [torch.equal(b, bits[0]) for b in bits[1:]]
        gaps = [(h.double() - one.double()).abs().nan_to_num(torch.inf) for h in held]
        error = max((float(g.max()) for g in gaps if g.numel()), default=0.0)
        ratio = 0.0 if all(equal) else float("inf")
        found.append(Difference(kind, rest, ratio, 0.0 if all(equal) else error, 0.0))
    return found


def _without_noise(value: Tensor, single: Tensor) -> Tensor:
    """Zero where an FP8 block holds nothing; not a number becomes a number, equal to itself.

    Blockwise scaling gives a block of zeros the scale 1.
    """
    real = single.masked_fill(single == 1.0, 0).nan_to_num(0.0, 0.0, 0.0).abs()
    noise = NOISE * float(real.max()) if real.numel() else 0.0
    nothing = (value.abs() < noise) | (value == 1.0)
    return value.nan_to_num(-1.0).masked_fill(nothing, 0)


def disagreements(ranks: list[Replayed]) -> list[tuple[int, str]]:
    """(rank, value) wherever a rank holds something else than an earlier rank that holds it too."""
    found, first = [], dict[str, str]()
    for rank, replayed in enumerate(ranks):
        for name, its in replayed.digests.items():
            if first.setdefault(name, its) != its:
                found.append((rank, name))
    return found


def holders(kind: str, name: str, worst: tuple[int, ...], ranks: list[Replayed]) -> list[int]:
    """The ranks that hold the element ``worst`` of a value."""
    parts = [(r, replayed.values.get(f"{kind}/{name}")) for r, replayed in enumerate(ranks)]
    inside = Region(worst, (1,) * len(worst))
    return [
        rank
        for rank, value in parts
        if isinstance(value, list) and any(contains(region, inside) for region, _ in value)
    ]
