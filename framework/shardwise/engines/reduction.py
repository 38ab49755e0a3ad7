"""Sums over the ranks that computed them: loss terms, metrics, results of evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.losses.contract import Loss
from shardwise.ops.logits import Logits
from shardwise.parallel.collectives import broadcast_bytes, sum_over
from shardwise.parallel.mesh import Mesh

__all__ = ["LossSums", "broadcast_from_last", "sum_over"]


class LossSums:
    """The loss terms of one global batch: counted before the first backward pass, divided once.

    Tensor and context parallel peers compute the same sums, and only the last pipeline stage has
    any: `Mesh.speaks` says whose are counted.
    """

    def __init__(self, loss: Loss, mesh: Mesh, batches: Sequence[MicroBatch]) -> None:
        self.loss, self.mesh = loss, mesh
        names = sorted(loss.weights)
        local = torch.zeros(len(names) + 1, dtype=torch.float64, device=mesh.device)
        for batch in batches:
            counts = loss.counts(batch)
            own = torch.stack([counts[n].to(local) for n in names])
            local += torch.cat([own, own.any()[None]])
        *totals, parts = sum_over(local, mesh.groups["dp"]).tolist()
        self.parts = int(parts)  # micro-batches that there is something to learn from
        # A term without a single valid element has a zero sum; dividing by 1 keeps it zero.
        self.totals = {n: t if t > 0 else 1.0 for n, t in zip(names, totals, strict=True)}
        self.sums: dict[str, Tensor] = {}
        self.metrics: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, logits: Tensor | Logits, batch: MicroBatch) -> Tensor:
        """Note a micro-batch's sums; returns the scalar to differentiate."""
        output = self.loss(logits, batch)
        for name, value in output.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        for name, (top, bottom) in output.metrics.items():
            a, b = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (a + top.detach().double(), b + bottom.detach().double())
        parts = [s * (self.loss.weights[n] / self.totals[n]) for n, s in output.sums.items()]
        return torch.stack(parts).sum()

    def reduced(self) -> dict[str, float]:
        """Metrics, ``loss`` among them, the same on every rank: one sum over all ranks."""
        mesh = self.mesh
        terms, names = sorted(self.totals), sorted(self.metrics)
        if mesh.layout.pp > 1:
            names = _from_last(names, mesh)
        zero = torch.zeros((), dtype=torch.float64, device=mesh.device)
        flat = [self.sums.get(n, zero) for n in terms]
        flat += [part for n in names for part in self.metrics.get(n, (zero, zero))]
        vector = torch.stack([torch.as_tensor(v, dtype=torch.float64).to(zero) for v in flat])
        values = sum_over(vector if mesh.speaks else vector * 0.0, mesh.groups["all"]).tolist()
        means = {n: values[i] / self.totals[n] for i, n in enumerate(terms)}
        result = {"loss": sum(self.loss.weights[n] * m for n, m in means.items())}
        if terms != ["loss"]:
            result |= {f"loss_{n}": m for n, m in means.items()}
        for i, n in enumerate(names):
            top, bottom = values[len(terms) + 2 * i : len(terms) + 2 * i + 2]
            if bottom:  # a mean over nothing is none
                result[n] = top / bottom
        return result


def _from_last(names: list[str], mesh: Mesh) -> list[str]:
    """The metrics that the last pipeline stage has; others cannot know them."""
    said = json.dumps(names).encode() if mesh.is_last_stage else None
    found: list[str] = json.loads(broadcast_bytes(said, mesh.last_stage, mesh.groups["pp"]))
    return found


def broadcast_from_last(results: Sequence[Tensor | None], mesh: Mesh) -> list[Tensor]:
    """Tensors that only the last pipeline stage has, on all of them."""
    group, source = mesh.groups["pp"], mesh.last_stage
    heads = [[str(r.dtype)[6:], list(r.shape)] for r in results if r is not None]
    said = json.dumps(heads).encode() if mesh.is_last_stage else None
    shared: list[Tensor] = []
    heads = json.loads(broadcast_bytes(said, source, group))
    for (dtype, shape), result in zip(heads, results, strict=True):
        memory = torch.empty(shape, dtype=getattr(torch, dtype), device=mesh.device)
        if result is not None:
            memory.copy_(result)
        dist.broadcast(memory, group_src=source, group=group)
        shared.append(memory)
    return shared
