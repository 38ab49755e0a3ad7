"""A generator that several ranks share: each has some heads of the model and of the cache.

All ranks of a group make the same calls in the same order. They have the same logits, and a draw is
a pure function of its key, hence they draw the same tokens without a word about them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.parallel import tensor
from shardwise.parallel.collectives import broadcast_bytes
from shardwise.parallel.full_tensor import chunk_size, join, local_tensor, tp_dim
from shardwise.parallel.layout import Layout
from shardwise.parallel.mesh import Mesh, build_mesh
from shardwise.rollout.backends import PlainBackend
from shardwise.rollout.pages import Cached

# Shape suffixes: B rows, V vocabulary, W words of this rank.


def check_tp(tp: int, model: DecoderConfig, world_size: int, key: str = "rollout.tp") -> None:
    """Raise ConfigError, under ``key``, if groups of ``tp`` ranks cannot share a generator."""
    heads, kv_heads = model.num_heads, model.kv_heads

    def refusal(tp: int) -> str:
        if world_size % tp:
            return f"it does not divide the {world_size} ranks of this run"
        if heads % tp:
            return f"it does not divide num_heads {heads}"
        if kv_heads % tp and tp % kv_heads:
            return f"it neither divides nor is a multiple of num_kv_heads {kv_heads}"
        return ""

    if why := refusal(tp):
        fit = [n for n in range(1, world_size + 1) if not refusal(n)]
        raise ConfigError(f"{key}: {tp}: {why}; nearest: {min(fit, key=lambda n: abs(n - tp))}")


def group_mesh(tp: int, device: torch.device) -> Mesh | None:
    """The world's ranks in groups of ``tp`` neighbours; a collective call. None: each is alone."""
    if tp == 1:
        return None
    return build_mesh(Layout(dp=dist.get_world_size() // tp, zero=0, tp=tp), device)


def cut(model: Decoder, mesh: Mesh) -> None:
    """Leave this rank its part of ``model`` (on the meta device), in place.

    Raises ConfigError for a model that its family's tensor-parallel table does not cover.
    """
    try:
        tensor.parallelize(model, registry.sharding(model.config), mesh)
    except (ValueError, ConfigError) as error:
        raise ConfigError(
            f"rollout.tp: this model cannot be cut ({error}); set rollout.tp to 1"
        ) from error


class ShardedBackend(PlainBackend):
    """The plain model, cut among the ranks of a group (see `cut`); logits are whole on each."""

    def __init__(self, model: Decoder, mesh: Mesh) -> None:
        self.mesh = mesh
        super().__init__(model)

    def _kv_heads(self) -> int:
        return max(1, super()._kv_heads() // self.mesh.layout.tp)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """See `PlainBackend`. Cut as torch.chunk does, which may leave a rank nothing."""
        tp, rank = self.mesh.layout.tp, self.mesh.place["tp"]
        dim = tp_dim(self.parameters[name], self.mesh)
        if dim is None:
            return whole
        total = whole.shape[dim]
        start = min(chunk_size(total, tp, 0) * rank, total)
        return whole.narrow(dim, start, chunk_size(total, tp, rank))

    def served(self) -> dict[str, Tensor]:
        """See `PlainBackend`: this rank's parts."""
        return {name: local_tensor(value) for name, value in self.parameters.items()}

    def forward(self, rows: Sequence[Cached]) -> Tensor:
        """See `PlainBackend`."""
        logits_BW = super().forward(rows)
        return join(logits_BW, self.config.vocab_size, 1, self.mesh.groups["tp"])

    def agreed(self, flags: Sequence[bool]) -> list[bool]:
        """See `PlainBackend`: what the first rank found."""
        return list(map(bool, broadcast_bytes(bytes(flags), 0, self.mesh.groups["tp"])))
