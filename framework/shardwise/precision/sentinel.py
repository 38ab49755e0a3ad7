"""The sentinel: a shadow of sampled FP8 layers, and what follows from looking at it.

At every look some layers compute each product a second time without quantisation. What differs,
what became zero, what was cut off and how far amaxes moved since the last look are metrics; a layer
beyond a limit computes unquantised from then on. All numbers are sums over all ranks, so all ranks
decide alike, and what was decided is part of the engine's state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.config.schema import SentinelConfig
from shardwise.ops import comm
from shardwise.ops.fp8 import OPERANDS
from shardwise.ops.fp8_linear import NUM_SUMS, PRODUCTS, Site

# Shape suffixes: L quantised layers of the whole model, N sums of a layer.


@dataclasses.dataclass(frozen=True)
class Look:
    """One layer at one step. ``error``: of the worst product (norm of the difference over norm).

    ``underflow``, ``overflow``: of the worst operand, the share of its non-zero elements that
    became zero, and of those that were cut off. ``drift``: log2 of an operand's amax over that of
    the last look, the furthest from 0; None at the first.
    """

    error: float
    underflow: float
    overflow: float
    drift: float | None

    def beyond(self, limits: SentinelConfig) -> str:
        """What is beyond its limit, in words; empty if nothing is."""
        found = (
            ("error", self.error, limits.max_error),
            ("underflow", self.underflow, limits.max_underflow),
            ("overflow", self.overflow, limits.max_overflow),
        )
        # Not a number is beyond any limit.
        return ", ".join(f"{n} {v:.3g} over {top:g}" for n, v, top in found if not v <= top)


def look(
    sums_N: Sequence[float], amax_3: Sequence[float], before_3: Sequence[float] | None
) -> Look:
    """From the sums of `fp8_linear` over all ranks."""
    products = [sums_N[2 * i : 2 * i + 2] for i in range(len(PRODUCTS))]
    rest = sums_N[2 * len(PRODUCTS) :]
    operands = [rest[3 * i : 3 * i + 3] for i in range(len(OPERANDS))]
    drifts = [
        math.log2(now / then)
        for now, then in zip(amax_3, before_3 or (), strict=False)
        if 0 < now < math.inf and 0 < then < math.inf
    ]
    return Look(
        error=_worst([math.sqrt(lost / whole) for lost, whole in products if whole != 0]),
        underflow=_worst([zero / there for there, zero, _ in operands if there]),
        overflow=_worst([cut / there for there, _, cut in operands if there]),
        drift=max(drifts, key=abs) if drifts else None,
    )


def _worst(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


class Sentinel:
    """Looks at the layers ``paths`` (all of the model's that are quantised) in turn."""

    def __init__(self, config: SentinelConfig, paths: Sequence[str]) -> None:
        self.config, self.paths = config, list(paths)
        self.fallen: dict[str, int] = {}  # layer: the step at which it fell back
        self.amax: dict[str, list[float]] = {}  # of each layer's last look
        self.looking: list[str] = []
        self.tally_LN: Tensor | None = None

    def begin(self, step: int, sites: Mapping[str, Site], device: torch.device) -> None:
        """Watch this step's layers, if it is a step to look at (counted from 0)."""
        self.looking = self.chosen(step)
        if not self.looking:
            return
        tally_LN = torch.zeros((len(self.looking), NUM_SUMS), dtype=torch.float64, device=device)
        for row, path in enumerate(self.looking):
            if path in sites:
                sites[path].watched, sites[path].tally = True, tally_LN[row]
        self.tally_LN = tally_LN

    def chosen(self, step: int) -> list[str]:
        """The layers to look at: a pure function of the step and of what has fallen."""
        there = [p for p in self.paths if p not in self.fallen]
        if not self.config.enabled or not there or (step + 1) % self.config.every:
            return []
        count = min(self.config.layers or len(there), len(there))
        first = ((step + 1) // self.config.every - 1) * count
        return sorted({there[(first + i) % len(there)] for i in range(count)}, key=there.index)

    def finish(
        self, step: int, sites: Mapping[str, Site], group: dist.ProcessGroup
    ) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Metrics and events of the look, the same on every rank of ``group`` (the model's)."""
        if not self.looking:
            return {}, []
        assert self.tally_LN is not None
        amax_L3 = torch.zeros((len(self.looking), 3), device=self.tally_LN.device)
        for row, path in enumerate(self.looking):
            if path in sites:
                amax_L3[row] = sites[path].amax_3
                sites[path].watched, sites[path].tally = False, None
        comm.all_reduce(self.tally_LN, group, "sentinel")
        comm.all_max(amax_L3, group, "sentinel")
        metrics: dict[str, float] = {}
        events: list[tuple[str, str]] = []
        for path, sums, amax in zip(
            self.looking, self.tally_LN.tolist(), amax_L3.tolist(), strict=True
        ):
            seen = look(sums, amax, self.amax.get(path))
            # Checkpoints hold JSON, which knows no infinity; 0 is an amax that nobody saw.
            self.amax[path] = [v if math.isfinite(v) else 0.0 for v in amax]
            self._note(metrics, path, seen)
            if (reason := seen.beyond(self.config)) and self.config.fallback:
                self.fallen[path] = step + 1
                events.append(
                    ("fp8_fallback", f"{path} computes unquantised from now on: {reason}")
                )
        self.tally_LN = None
        metrics["fp8_fallbacks"] = float(len(self.fallen))
        self.obey(sites)
        return metrics, events

    def _note(self, metrics: dict[str, float], path: str, seen: Look) -> None:
        for name, value in dataclasses.asdict(seen).items():
            if value is None:
                continue
            metrics[f"fp8.{path}.{name}"] = value
            worst = metrics.get(f"fp8_{name}")
            if worst is None or not abs(value) <= abs(worst):
                metrics[f"fp8_{name}"] = value

    def obey(self, sites: Mapping[str, Site]) -> None:
        """Make the layers that fell compute unquantised, and no others."""
        for path, site in sites.items():
            site.active = path not in self.fallen

    def state_dict(self) -> dict[str, Any]:
        """JSON values, the same on every rank."""
        return {"fallen": self.fallen, "amax": self.amax}

    def load_state_dict(self, state: Mapping[str, Any], sites: Mapping[str, Site]) -> None:
        """Continue from `state_dict`; layers that are not quantised here are forgotten."""
        self.fallen = {p: int(s) for p, s in state["fallen"].items() if p in self.paths}
        self.amax = {p: [float(v) for v in a] for p, a in state["amax"].items() if p in self.paths}
        self.obey(sites)
