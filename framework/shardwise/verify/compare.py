"""What a layout found against one process: differences, and which of them are bugs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shardwise.ops.regions import Region
from shardwise.verify.bounds import EXACT_BOUND, NOISE, ROUNDING_FACTOR, kind_of
from shardwise.verify.notes import Noted, Reference
from shardwise.verify.roundings import undeclared_lines
from shardwise.verify.walk import Walked


@dataclasses.dataclass(frozen=True)
class Difference:
    """One value of one layout: the norm of its error over the bound."""

    kind: str
    name: str
    ratio: float
    error: float
    bound: float
    worst: tuple[int, ...] = ()  # index of the element that is furthest off
    ranks: tuple[int, ...] = ()  # who holds that element
    why: str = ""  # where it is no matter of numbers
    times: float | None = None  # what it is of what it should be, where that is one plain factor

    @property
    def is_bug(self) -> bool:
        """Whether rounding cannot explain it."""
        return not self.ratio <= 1.0  # NaN is a bug too

    def is_of(self, update: str) -> bool:
        """Whether it is a value of this update: ``actor update 2``."""
        return f"{self.name} ".startswith(f"{update} ")


def compare(
    reference: Reference,
    limits: Mapping[str, float],
    ranks: Sequence[Mapping[str, Sequence[Noted]]],
    names: Iterable[str],
) -> list[Difference]:
    """The named values of a layout against the reference, in the order in which they came about."""
    found = []
    for name in names:
        kind, _, what = name.partition("/")
        exact = reference.values[name]
        regions: dict[Region, Noted] = {}  # what is furthest off, of those who hold the same
        held: dict[Region, dict[int, float]] = {}
        for rank, values in enumerate(ranks):
            for part in values.get(name, ()):
                held.setdefault(part.region, {})[rank] = _sortable(part.square)
                if part.region not in regions or not part.square <= regions[part.region].square:
                    regions[part.region] = part
        if sum(region.volume for region in regions) < exact.numel() or (
            not regions and exact.numel() == 0
        ):
            why = "no rank has it" if not regions else "some of it is on no rank"
            found.append(Difference(kind, what, math.inf, math.inf, limits[name], why=why))
            continue
        error = math.sqrt(sum(part.square for part in regions.values()))
        limit = limits[name]
        ratio = 0.0 if error == 0.0 else error / limit if limit else math.inf
        if ratio <= 1.0:
            found.append(Difference(kind, what, ratio, error, limit))
            continue
        region = max(regions, key=lambda r: _sortable(regions[r].square))
        off = held[region]
        who = tuple(r for r in off if off[r] > limit**2) or tuple(off)
        times = _factor(exact, regions.values())
        worst = regions[region].worst
        found.append(Difference(kind, what, ratio, error, limit, worst, who, times=times))
    return found


def _factor(exact: Tensor, parts: Iterable[Noted]) -> float | None:
    """By what a value is multiplied, if that is all and a whole number, its inverse, or zero."""
    norm2 = float(exact.square().sum())
    square, along = (sum(x) for x in zip(*((p.square, p.along) for p in parts), strict=True))
    # An error that is parallel to the value itself: Cauchy and Schwarz become equal. Products of
    # floats overflow to infinity, where powers raise.
    if not norm2 or not abs(square * norm2 - along * along) <= 1e-9 * square * norm2 < math.inf:
        return None
    factor = float(1.0 + along / norm2)
    if abs(factor) <= 1024 and abs(factor - round(factor)) <= 1e-6:
        return float(round(factor))
    parts_of = round(1.0 / factor)
    if 1 <= abs(parts_of) <= 1024 and abs(1.0 / factor - parts_of) <= 1e-6:
        return 1.0 / parts_of
    return None


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def unknown(reference: Reference, ranks: Sequence[Walked]) -> list[Difference]:
    """What a layout came to that one process never does."""
    names = dict.fromkeys(n for r in ranks for n in r.found if n not in reference.values)
    why = "one process never came to it"
    parts = (name.partition("/") for name in names)
    return [Difference(kind, what, math.inf, math.inf, 0.0, why=why) for kind, _, what in parts]


def misdealt(reference: Walked, ranks: Sequence[Walked]) -> list[Difference]:
    """Updates whose samples, over all data ranks, are not those of one process, each once."""
    found = []
    for where, (_, wanted) in reference.dealt.items():
        by_data_rank = {r.dealt[where][0]: r.dealt[where][1] for r in ranks if where in r.dealt}
        dealt = sorted(i for ids in by_data_rank.values() for i in ids)
        if dealt == sorted(wanted):
            continue
        left, twice = set(wanted) - set(dealt), {i for i in dealt if dealt.count(i) > 1}
        strange = set(dealt) - set(wanted)
        words = [
            f"{what} {', '.join(map(str, sorted(ids)))}"
            for what, ids in (
                ("nobody learns from", left),
                ("learnt from twice:", twice),
                ("not of this update:", strange),
            )
            if ids
        ]
        found.append(
            Difference("dealing", where, math.inf, math.inf, 0.0, why="; ".join(words) or "order")
        )
    return found


def undeclared(
    reference: Reference, limits: Mapping[str, float], ranks: Sequence[Walked]
) -> list[Difference]:
    """Dtypes that are not the policy's: of a tensor, on every rank that has of it.

    A rank's part may hold few digits by right: rows of an embedding that no token meets. So may
    rounding noise: where terms cancel out, the sum lies on the grid of the largest. It is noise
    where one process may lose more than there is; a vector's gradient, a sum over tokens that were
    rounded one by one, is not judged. And a weight that stands still is as it was drawn.
    """
    told: dict[tuple[str, str, str], list[int]] = {}
    words: dict[tuple[str, str, str], str] = {}
    for rank, walked in enumerate(ranks):
        for role, problems_ in walked.dtypes.items():
            for (kind, name), sentence in problems_.items():
                key = (f"{role} " if role else "", kind, name)
                told.setdefault(key, []).append(rank)
                words[key] = sentence
    found = []
    for key, who in told.items():
        label, kind, name = key
        parameter = name.split(" ")[0] if kind in ("masters", "moments", "gradients") else ""
        own = f"gradient/{label}update 1 {parameter}"
        holders = [r for r, walked in enumerate(ranks) if walked.found.get(own)]
        if own in reference.values and (
            who != holders
            or limits[own] > ROUNDING_FACTOR * reference.norms[own]
            or (kind != "masters" and reference.values[own].dim() < 2)
            or (kind == "masters" and _stands_still(label, name, reference))
        ):
            continue
        what = f"{label}{kind} {name}"
        found.append(
            Difference("dtype", what, math.inf, math.inf, 0.0, ranks=tuple(who), why=words[key])
        )
    return found


def rounded(single: Walked, ranks: Sequence[Walked]) -> list[Difference]:
    """Lines of the source that round to 16 bits, or sum in them, and are not declared to."""
    found = undeclared_lines(single.lines, [r.lines for r in ranks])
    return [
        Difference("dtype", "", math.inf, math.inf, 0.0, ranks=who, why=words)
        for words, who in found.items()
    ]


def _stands_still(label: str, name: str, reference: Reference) -> bool:
    """Whether no update moves a weight: its rate, or its gradients, are zero."""
    before, behind = f"weight/{label}update ", f" {name}"
    initial = reference.values[f"initial/{label}{name}"]
    later = (n for n in reference.values if n.startswith(before) and n.endswith(behind))
    return all(torch.equal(reference.values[n], initial) for n in later)


def compare_scales(
    single: Mapping[str, Tensor], ranks: Sequence[Walked], kind: str = ""
) -> list[Difference]:
    """Amaxes, scales and histories of FP8, each bitwise equal to one process's.

    Every rank tells of its own parts; who holds the same part must hold the same numbers, and
    together the ranks hold all. A block of zeros (a query that sees one key) may be noise where a
    ring merges what its ranks found. ``kind``: these alone.
    """
    found = []
    for name in dict.fromkeys([*single, *(n for walked in ranks for n in walked.scales)]):
        if not name.startswith(kind):
            continue
        held = [p.scales[name] for p in ranks if name in p.scales]
        sort, rest = kind_of(name), name.partition("/")[2]
        if name not in single or not held or any(h.shape != single[name].shape for h in held):
            found.append(Difference(sort, rest, float("inf"), float("inf"), 0.0))
            continue
        one = single[name]
        bits = [_without_noise(v, one) for v in (one, *held)]
        equal = [torch.equal(b, bits[0]) for b in bits[1:]]
        gaps = [(h.double() - one.double()).abs().nan_to_num(torch.inf) for h in held]
        error = max((float(g.max()) for g in gaps if g.numel()), default=0.0)
        ratio = 0.0 if all(equal) else float("inf")
        found.append(Difference(sort, rest, ratio, 0.0 if all(equal) else error, 0.0))
    return found


def _without_noise(value: Tensor, single: Tensor) -> Tensor:
    """Zero where an FP8 block holds nothing; not a number becomes a number, equal to itself.

    Blockwise scaling gives a block of zeros the scale 1.
    """
    real = single.masked_fill(single == 1.0, 0).nan_to_num(0.0, 0.0, 0.0).abs()
    noise = NOISE * float(real.max()) if real.numel() else 0.0
    nothing = (value.abs() < noise) | (value == 1.0)
    return value.nan_to_num(-1.0).masked_fill(nothing, 0)


def problems(ranks: Sequence[Walked]) -> list[Difference]:
    """What is wrong on a rank whatever the numbers are."""
    return [
        Difference("run", "", math.inf, math.inf, 0.0, ranks=(rank,), why=problem)
        for rank, walked in enumerate(ranks)
        for problem in walked.problems
    ]


def disagreements(ranks: Sequence[Walked]) -> list[Difference]:
    """Wherever a rank holds something else than an earlier rank that holds it too."""
    found, first = [], dict[tuple[str, Region], tuple[int, str]]()
    for rank, walked in enumerate(ranks):
        for name, parts in walked.found.items():
            for part in parts:
                other, digest = first.setdefault((name, part.region), (rank, part.digest))
                if digest != part.digest:
                    kind, _, what = name.partition("/")
                    why = f"not bitwise what rank {other} holds"
                    found.append(Difference(kind, what, math.inf, 0.0, 0.0, ranks=(rank,), why=why))
    return found


def said_of(found: list[Difference], words: str) -> list[Difference]:
    """Differences with words about when they came about."""
    return [dataclasses.replace(d, name=f"{d.name}, {words}") for d in found]


def since_resume(found: list[Difference], exact: Reference) -> list[Difference]:
    """Of what came about after the run was broken off, differences say so."""
    later = set(exact.order[exact.marked["values"] : exact.marked["ended"]])
    updates = {name.partition("/")[2] for name in later if kind_of(name) == "learning rate"}

    def is_later(d: Difference) -> bool:
        update = re.match(r"(?:\w+ )?update \d+", d.name)
        return f"{d.kind}/{d.name}" in later or (update is not None and update.group() in updates)

    words = "after a resume"
    return [dataclasses.replace(d, name=f"{d.name}, {words}") if is_later(d) else d for d in found]


def origin(reference: Reference, ranks: Sequence[Walked]) -> str:
    """The first module whose output, or the gradient that reaches it, is not one process's."""
    names = [n for n in reference.order if n.startswith(("output/", "output gradient/"))]
    scale = {
        kind: math.hypot(*(reference.norms[n] for n in names if n.startswith(kind)))
        for kind in ("output/", "output gradient/")
    }
    for name in names:
        kind = name[: name.index("/") + 1]
        bound = EXACT_BOUND * reference.norms[name] + NOISE * scale[kind]
        for rank, walked in enumerate(ranks):
            for part in walked.found.get(name, ()):
                if math.sqrt(part.square) <= bound:
                    continue
                what = name.replace("/", " of ", 1)
                token, feature = part.worst
                after = walked.touched.get(name, "")
                return (
                    f"it begins at the {what}, token {token}, feature {feature}, on rank {rank}"
                    + (f", after {after}" if after else "")
                    + _unseen(name, names, ranks)
                )
    return ""


def _unseen(gradient: str, names: Sequence[str], ranks: Sequence[Walked]) -> str:
    """Modules that make a gradient, and whose output is on no rank as one process has it."""
    output = gradient.replace("output gradient/", "output/")
    if output == gradient or output not in names:
        return ""
    of_sample = gradient[gradient.rindex(" sample ") :]
    later = [n for n in names[names.index(output) + 1 :] if n.startswith("output/")]
    unseen = [
        n.removesuffix(of_sample).split()[-1]
        for n in later
        if n.endswith(of_sample) and not any(n in walked.found for walked in ranks)
    ]
    return f"; behind it, {' and '.join(unseen)} cannot be compared" if unseen else ""
