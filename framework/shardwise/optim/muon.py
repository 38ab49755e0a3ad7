"""Muon: momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

Matrices alone; AdamW updates vectors and those that ``by_adamw`` names, embeddings and the head by
default, with the same rate: the update of a matrix is scaled to AdamW's size (Liu et al. 2025,
"Muon is Scalable for LLM Training", equation 4), or as Jordan does.

Orthogonalising needs the whole matrix: ranks that hold parts gather the momentum, each computes the
same, and keeps its part. Newton-Schulz runs in the dtype of the weights (fp32 under bf16).
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from shardwise.config.optimizers import MuonConfig
from shardwise.optim import parts
from shardwise.optim.rule import RuleOptimizer, adamw_direction, counter
from shardwise.parallel.full_tensor import full_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(RuleOptimizer):
    """One state for a matrix, two for what AdamW updates."""

    config: MuonConfig

    def start(self, name: str, param: Parameter) -> dict[str, Tensor]:
        """See `RuleOptimizer`."""
        others = any(fnmatchcase(name, pattern) for pattern in self.config.by_adamw)
        if param.dim() == 2 and not others:
            return {"momentum_buffer": parts.zeros(param)}
        moments = {key: parts.zeros(param) for key in ("exp_avg", "exp_avg_sq")}
        return {"step": counter(), **moments}

    def update(
        self, param: Parameter, weight: Tensor, grad: Tensor, state: dict[str, Any], group: Any
    ) -> None:
        """See `RuleOptimizer`."""
        lr, config = group["lr"], self.config
        weight.mul_(1 - lr * group["weight_decay"])
        if "momentum_buffer" not in state:
            m, v = (parts.local_tensor(state[key]) for key in ("exp_avg", "exp_avg_sq"))
            weight.add_(adamw_direction(grad, m, v, config, state), alpha=-lr)
            return
        m = parts.local_tensor(state["momentum_buffer"])
        m.lerp_(grad, 1 - config.momentum)
        wanted = grad.lerp(m, config.momentum) if config.nesterov else m
        scale = lr * size_factor(param.shape[0], param.shape[1], config.scale)
        if not parts.holders(param):
            weight.add_(orthogonalised(wanted, config.ns_steps), alpha=-scale)
            return
        assert isinstance(param, DTensor) and self.mesh is not None
        held = parts.zeros(param)
        parts.local_tensor(held).copy_(wanted)
        whole = orthogonalised(full_tensor(held, self.mesh), config.ns_steps)
        parts.keep_own(held, whole)
        weight.add_(parts.local_tensor(held), alpha=-scale)


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """Singular values of a matrix towards 1, by a quintic iteration of Newton and Schulz."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def size_factor(rows: int, columns: int, scale: str) -> float:
    """What an orthogonal matrix is multiplied by, beside the rate."""
    if scale == "adamw":  # root mean square 0.2, about AdamW's
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
