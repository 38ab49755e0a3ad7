"""What a run of a stage computes, by name: kept whole for a reference, else compared at once.

A name is ``kind/what``. Every rank notes what it has: a value that all ranks know, or its own
regions of a tensor. Where a reference is given, a rank compares its regions with it and keeps
figures alone, so that a world of many ranks sends little. Kinds, in the order in which they come
about: initial, rollout, forward pass, what a stage computes of its rollouts (advantages, returns),
sample, learning rate, loss, metric, sentinel, gradient, clip norm, moment, weight, logged, event,
generated tokens, generated logprobs, evaluation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwise.ops.local_shards import local_shards
from shardwise.ops.regions import Region, full_region
from shardwise.precision.policy import DtypeCheck
from shardwise.rollout.weights import digest
from shardwise.verify.roundings import Lines


@dataclasses.dataclass(frozen=True)
class Noted:
    """What one rank has of a value: a region, and how far it is from the reference there.

    ``square``: of the 2-norm of the error; inf where nothing is to be compared with. ``worst``: the
    global index of the element that is furthest off. ``along``: the error's inner product with the
    reference, which tells a wrong factor.
    """

    region: Region
    square: float
    worst: tuple[int, ...]
    digest: str
    along: float = 0.0


class Reference:
    """The values of a finished run, in the order in which they came about."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["said"])
        self.order: list[str] = said["order"]
        self.marked: dict[str, Any] = said[
            "marked"
        ]  # where it was saved, and where its steps ended
        self.values: dict[str, Tensor] = load_file(path)

    @functools.cached_property
    def norms(self) -> dict[str, float]:
        """2-norm of every value."""
        return {name: float(value.norm()) for name, value in self.values.items()}


class Notes:
    """One rank's. With a ``reference``, values are compared with it and forgotten."""

    def __init__(self, reference: Reference | None = None) -> None:
        self.reference = reference
        self.values: dict[str, Tensor] = {}  # of a reference in the making
        self.found: dict[str, list[Noted]] = {}
        self.dealt: dict[str, tuple[int, list[int]]] = {}  # update: data rank, samples with loss
        self.scales: dict[str, Tensor] = {}  # what this rank scaled by, in FP8
        self.problems: list[str] = []  # what is wrong whatever the numbers are
        self.dtypes: dict[str, DtypeCheck] = {}  # by role
        self.lines: Lines = {}  # where 16 bits were rounded to
        self.skipped: dict[str, list[int]] = {}  # by role, updates (from 0) that changed nothing
        self.volumes: list[dict[str, Any]] = []  # communication of the first update
        self.touched: dict[str, str] = {}  # the collective before an activation
        self.probe = ""  # the update whose activations are noted
        self.marked: dict[str, Any] = {}
        self.step = 0
        self.counts: Counter[str] = Counter()

    def note(self, kind: str, what: str, value: Any) -> None:
        """A value that every rank which notes it has whole."""
        whole = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value, float))
        self._add(f"{kind}/{what}", [(full_region(whole.shape), whole)])

    def note_tensor(self, kind: str, what: str, tensor: Tensor, over: float = 1.0) -> None:
        """This rank's regions of a tensor, which may be a DTensor, divided by ``over``."""
        parts = [
            (shard.region, shard.view if over == 1.0 else shard.view / over)
            for shard in local_shards(what, tensor)
        ]
        self._add(f"{kind}/{what}", parts)

    def note_slices(self, name: str, parts: list[tuple[int, Tensor]], rank: int, size: int) -> None:
        """Stretches [tokens, features] of an activation, each with its first token.

        Features that are fewer than the reference's are the ``rank``-th of ``size`` equal parts;
        where they are not, or are too few for that, nothing is noted.
        """
        if self.reference is None:
            whole = torch.cat([part for _, part in parts])
            return self._add(name, [(full_region(whole.shape), whole)])
        exact = self.reference.values.get(name)
        if exact is not None and exact.shape[1] < size:
            return None  # a scalar head: one rank holds its feature, the others what fills up
        regions = []
        for token, part in parts:
            features = part.shape[1]
            whole_width = exact is None or features == exact.shape[1]
            if exact is not None and not whole_width and features * size != exact.shape[1]:
                return None
            offset = 0 if whole_width else rank * features
            regions.append((Region((token, offset), tuple(part.shape)), part))
        return self._add(name, regions)

    def width_of(self, name: str) -> int | None:
        """Features of a reference's activation."""
        exact = None if self.reference is None else self.reference.values.get(name)
        return None if exact is None else exact.shape[1]

    def count(self, what: str) -> int:
        """How often this was asked, this time included."""
        self.counts[what] += 1
        return self.counts[what]

    def forget(self, kind: str, where: str) -> None:
        """Leave out what was noted of an update, which came to nothing."""
        for name in [n for n in self.found if n.startswith(f"{kind}/{where} ")]:
            del self.found[name]
            self.values.pop(name, None)

    def _add(self, name: str, parts: list[tuple[Region, Tensor]]) -> None:
        if name in self.found:
            self.problems.append(f"{name.replace('/', ' ', 1)} came about twice on one rank")
            return
        self.found[name] = [self._noted(name, region, part) for region, part in parts]

    def _noted(self, name: str, region: Region, part: Tensor) -> Noted:
        value = part.detach().to("cpu", torch.float64)
        if self.reference is None:
            self.values[name] = value = value.clone()
            return Noted(region, 0.0, (), digest(value))
        exact = self.reference.values.get(name)
        if (
            exact is None
            or any(o + n > m for o, n, m in zip(*region, exact.shape, strict=False))
            or exact.dim() != value.dim()
        ):
            return Noted(region, float("inf"), (), digest(value))
        wanted = exact[region.relative_to((0,) * exact.dim())]
        gap = (value - wanted).reshape(-1)
        square = float(gap.dot(gap))
        worst: tuple[int, ...] = ()
        if square and value.dim():
            flat = int(gap.abs().nan_to_num(torch.inf).argmax())
            inside = np.unravel_index(flat, value.shape)
            worst = tuple(int(i) + o for i, o in zip(inside, region.offset, strict=True))
        along = float(gap.dot(wanted.reshape(-1))) if square else 0.0
        return Noted(region, square, worst, digest(value), along)

    def mark(self) -> None:
        """A run is saved here, to go on from on other layouts."""
        self.marked |= {"values": len(self.values), "counts": dict(self.counts)}

    def at_mark(self) -> Notes:
        """New notes of a run that goes on from where the reference was saved."""
        assert self.reference is not None
        again = Notes(self.reference)
        again.counts, again.step = Counter(self.reference.marked["counts"]), 0
        return again

    def save(self, path: Path) -> None:
        """A reference, for others to compare with."""
        said = {"order": list(self.values), "marked": self.marked}
        save_file(self.values, path, {"said": json.dumps(said)})
