"""How an adapter starts: functions of (seed, name), and of the weights that it adapts.

- default: A normal with the deviation of PEFT's (uniform within 1 / sqrt(inputs)), B zero (Hu et
  al. 2021, section 4.1). An embedding's A is zero and its B normal, as in loralib.
- pissa: B A is the part of W in its largest singular directions (Meng et al. 2024, section 3), and
  is taken off again by ``A0``, ``B0``.
- orthogonal: A and B random over two orthogonal halves of the rank, so that B A is zero, as PEFT's.
- magnitudes are the norms of W's rows (Liu et al. 2024, section 4.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.targets import MARK, Target
from shardwise.models.common.init import InitSpec, init_tensor

ORTHOGONAL_STD = 0.1


def needs_weights(config: LowRankConfig) -> bool:
    """Whether the start depends on the weights that are adapted."""
    return config.magnitudes or config.init == "pissa"


def start(
    target: Target, config: LowRankConfig, seed: int, weight: Tensor | None
) -> dict[str, Tensor]:
    """Initial values (whole, CPU) by the last part of the parameter's name.

    ``weight``: rows x columns, fp32 or fp64, where `needs_weights`; singular vectors and norms are
    taken in its dtype.
    """
    config = config.of(target.path)
    rank = config.rank
    inputs, outputs = target.columns, target.rows
    if target.embeds:
        inputs, outputs = outputs, inputs

    def normal(name: str, shape: tuple[int, ...], std: float) -> Tensor:
        full = f"{target.path}.{MARK}.{name}"
        return init_tensor(full, shape, InitSpec("normal", std), seed)

    if target.embeds:
        return {"A": torch.zeros(rank, inputs), "B": normal("B", (outputs, rank), 1.0)}
    if config.init == "pissa":
        assert weight is not None
        found = _principal(weight, rank, config.scaling)
    elif config.init == "orthogonal":
        q_RR = torch.linalg.qr(normal("basis", (rank, rank), 1.0).double())[0].float()
        left = normal("B", (outputs, rank // 2), ORTHOGONAL_STD)
        right = normal("A", (rank // 2, inputs), ORTHOGONAL_STD)
        found = {"A": q_RR[::2].T @ right, "B": left @ q_RR[1::2]}
    else:
        std = 1.0 / math.sqrt(3 * inputs)
        found = {"A": normal("A", (rank, inputs), std), "B": torch.zeros(outputs, rank)}
    if config.magnitudes:
        assert weight is not None
        found["magnitude"] = torch.linalg.vector_norm(weight, dim=1)
    return found


def _principal(weight: Tensor, rank: int, scaling: float) -> dict[str, Tensor]:
    """A and B with ``s B A`` the best approximation of that rank; the largest of a column of B
    is positive, so that the signs are nobody's choice."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    signs = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))
    root = (s / scaling).sqrt()
    a, b = root[:, None] * (signs.T * vh), u * signs * root
    return {"A": a, "B": b, "A0": a, "B0": b}
