"""An update of local parts: the numbers of DTensor's own update, in the same memory."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from shardwise.config.schema import StageConfig
from shardwise.optim.build import build_optimizer, optimizer_tensors
from shardwise.optim.local import local_step
from tests.support.pool import RankPool

SHAPES = {"a": (5, 3), "b": (1, 4), "c": (4,), "plain": (3,), "frozen": (2, 2)}


def _updated(kind: str, local: bool) -> tuple[dict[str, torch.Tensor], list[bool]]:
    """Weights and state after two updates, and whether each is where and what it was."""
    mesh = init_device_mesh("cpu", (2,))
    placements = {"a": Shard(0), "b": Shard(0), "c": Replicate(), "frozen": Shard(1)}
    g = torch.Generator().manual_seed(0)
    named: dict[str, Parameter] = {}
    for name, shape in SHAPES.items():
        value = torch.randn(shape, generator=g)
        cut = placements.get(name)
        named[name] = Parameter(distribute_tensor(value, mesh, [cut]) if cut else value)
    stage = {"kind": "any", "steps": 1, "optimizer": {"kind": kind, "no_decay": ["c"]}}
    optimizer = build_optimizer(named.items(), StageConfig.model_validate(stage).optimizer)
    before = {**named, **optimizer_tensors(optimizer, named.items())}
    memory = {n: _local(t).data_ptr() for n, t in before.items()}
    for _ in range(2):
        for name, param in named.items():
            if name != "frozen":
                grad = torch.randn(SHAPES[name], generator=g)
                cut = placements.get(name)
                param.grad = distribute_tensor(grad, mesh, [cut]) if cut else grad
        local_step(optimizer) if local else optimizer.step()
    after = {**named, **optimizer_tensors(optimizer, named.items())}
    same = [after[n] is before[n] and _local(after[n]).data_ptr() == memory[n] for n in before]
    return {n: _local(t).detach().clone() for n, t in after.items()}, same


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_it_is_the_update_of_dtensors(ranks: RankPool, kind: str) -> None:
    found, expected = (ranks.run(_updated, kind, local, world=2) for local in (True, False))
    for (ours, same), (theirs, _) in zip(found, expected, strict=True):
        assert all(same)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name


class Whole(torch.optim.AdamW):
    """An optimizer that wants to see whole parameters."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        self.seen = [type(p) for g in self.param_groups for p in g["params"]]


def _seen() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    optimizer = Whole([Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))])
    local_step(optimizer)
    return [kind.__name__ for kind in optimizer.seen]


def test_other_kinds_see_dtensors(ranks: RankPool) -> None:
    assert ranks.run(_seen, world=2) == [["DTensor"]] * 2
