"""How far weights may be apart where an optimizer moves them alike for any gradient, however small.

Rounding then decides which way an element goes whose gradient is of its size. Each kind that
divides by the size of a gradient, or takes its sign, has its rule here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from shardwise.config.optimizers import (
    FactoredConfig,
    LionConfig,
    MomentsConfig,
    OptimizerConfig,
    ScheduleFreeConfig,
    SgdConfig,
)

UPDATE = re.compile(r"(?:(\w+) )?update (\d+) (.*)")
Values = Mapping[str, Tensor]
Limits = Mapping[str, float]
FURTHEST = 2.0  # of a move, where rounding decides its direction


def undecided(
    what: str,
    exact: Values,
    limits: Limits,
    optimizers: Mapping[str, OptimizerConfig],
    blind: bool = False,
) -> float:
    """2-norm of how far a weight may be apart: over its updates, the sum of how far each may lead.

    An error d of the first moment moves an element by lr * d / sqrt(v), and where d is as large
    as the moment itself, by at most twice the furthest move. An element that nothing has met (a
    word's row) is not moved, unless zeros are what terms came to: ``blind``.
    """
    match = UPDATE.fullmatch(what)
    assert match is not None
    role, last, name = match.group(1) or "", int(match.group(2)), match.group(3)
    label = f"{role} " if role else ""
    total: Tensor | None = None
    for update in range(1, last + 1):
        where = f"{label}update {update}"
        skipped = [float(exact[f"skipped/{label}update {u}"]) for u in range(1, update + 1)]
        steps = update - int(sum(skipped))
        if steps < 1 or skipped[-1]:
            continue
        lr = float(exact[f"learning rate/{where}"]) * optimizers[role].lr_scale_of(name)
        moved = _moved(f"{label}update {{}} {name}", update, steps, exact, limits, optimizers[role])
        if moved is None:
            return 0.0
        gradient = exact.get(f"gradient/{where} {name}")
        if gradient is not None and not blind:
            first = exact.get(f"moment/{where} {name} exp_avg", gradient)
            moved = moved.masked_fill((gradient == 0) & (first == 0), 0.0)
        move = lr * moved.clamp(max=FURTHEST)
        total = move if total is None else total + move
    return 0.0 if total is None else float(total.norm())


def _moved(
    what: str, update: int, steps: int, exact: Values, limits: Limits, config: OptimizerConfig
) -> Tensor | None:
    """Over the rate, how far each element may be moved otherwise; None if the kind needs none."""

    def state(kind: str, of: int = update) -> Tensor | None:
        return exact.get(f"moment/{what.format(of)} {kind}")

    def error(name: str, like: Tensor) -> float:
        return limits[name] / math.sqrt(max(1, like.numel()))

    gradient = f"gradient/{what.format(update)}"
    m, v = state("exp_avg"), state("exp_avg_sq")
    moment = f"moment/{what.format(update)} exp_avg"
    if isinstance(config, LionConfig) and m is not None:
        # What the sign is taken of, from the momentum before and behind.
        before = state("exp_avg", update - 1)
        before = torch.zeros_like(m) if before is None else before
        share = (1 - config.beta1) / (1 - config.beta2)
        mixed = config.beta1 * before + share * (m - config.beta2 * before)
        return FURTHEST * (mixed.abs() <= (1 + share) * error(moment, m)).to(m)
    if isinstance(config, ScheduleFreeConfig) and v is not None and gradient in exact:
        root = (v / (1 - config.beta2**steps)).sqrt() + config.eps
        return error(gradient, v) / root
    if isinstance(config, MomentsConfig) and m is not None and v is not None:
        root = (v / (1 - config.beta2**steps)).sqrt() + config.eps
        return error(moment, m) / (1 - config.beta1**steps) / root
    if isinstance(config, SgdConfig) and gradient in limits:
        momentum = f"moment/{what.format(update)} momentum_buffer"
        moved = limits[gradient] + limits.get(momentum, 0.0)
        weight = exact[f"weight/{what.format(update)}"]
        return torch.full_like(weight, moved / math.sqrt(max(1, weight.numel())))
    if isinstance(config, FactoredConfig):
        return _factored(what, update, exact, limits, config)
    return None


def _factored(
    what: str, update: int, exact: Values, limits: Limits, config: FactoredConfig
) -> Tensor | None:
    rows, columns, v = (
        exact.get(f"moment/{what.format(update)} {kind}")
        for kind in ("row_var", "col_var", "variance")
    )
    if v is None and (rows is None or columns is None):
        return None
    if v is None:
        assert rows is not None and columns is not None
        v = rows @ columns / rows.mean().clamp(min=config.eps1)
    gradient = f"gradient/{what.format(update)}"
    if gradient not in limits:  # updated in the backward pass
        return None
    weight = exact[f"weight/{what.format(update)}"]
    size = max(config.eps2, float(weight.norm()) / math.sqrt(max(1, weight.numel())))
    root = v.clamp(min=config.eps1**2).sqrt()
    return size * (limits[gradient] / math.sqrt(max(1, v.numel())) / root).clamp(max=FURTHEST)
