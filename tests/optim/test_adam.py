"""Adam by NVIDIA's apex, on a stand-in with its releases' signatures, is torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from shardwise.config.optimizers import AdamConfig, AdamWConfig
from shardwise.optim.adam import ApexAdam
from shardwise.optim.build import build_optimizer, optimizer_tensors, set_lr
from tests.contracts.apex import installed
from tests.contracts.signatures import groups
from tests.support.pool import RankPool

SHAPES = {"w.weight": (6, 4), "norm.weight": (4,), "w.bias": (5,)}
NEWEST = groups("apex")[-1]


def config(kind: str, fused: str) -> Any:
    own = {"adamw": AdamWConfig, "adam": AdamConfig}[kind]
    scaled = [{"match": "w.*", "lr_scale": 0.5}]
    return own.model_validate({"kind": kind, "lr": 1e-2, "groups": scaled, "fused": fused})


def start(mesh: Any = None) -> dict[str, Parameter]:
    g = torch.Generator().manual_seed(0)
    whole = {n: torch.randn(shape, generator=g) for n, shape in SHAPES.items()}
    if mesh is None:
        return {n: Parameter(t) for n, t in whole.items()}
    return {n: Parameter(distribute_tensor(t, mesh, [Shard(0)])) for n, t in whole.items()}


def update(optimizer: Any, named: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(1 + step)
        for name, p in named.items():
            grad = torch.randn(SHAPES[name], generator=g)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements)
            p.grad = grad
        set_lr(optimizer, 1e-2 * (1 - 0.1 * step))
        optimizer.step()


def same(named: dict[str, Parameter], other: dict[str, Parameter]) -> None:
    for name, p in named.items():
        torch.testing.assert_close(p.data, other[name].data, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("version", groups("apex"))
def test_updates_are_torchs_and_runs_go_on_with_or_without_it(version: str, kind: str) -> None:
    ours, theirs = start(), start()
    by_torch = build_optimizer(theirs.items(), config(kind, "auto"))
    update(by_torch, theirs, range(5))
    with installed(version):
        by_apex = build_optimizer(ours.items(), config(kind, "apex"))
        assert isinstance(by_apex, ApexAdam)
        update(by_apex, ours, range(3))
    # Without the library from here on, then with it once more.
    for fused, steps in (("auto", range(3, 4)), ("apex", range(4, 5))):
        kept = copy.deepcopy(optimizer_tensors(by_apex, ours.items()))
        with installed(version):
            by_apex = build_optimizer(ours.items(), config(kind, fused))
            now = optimizer_tensors(by_apex, ours.items())
            assert now.keys() == kept.keys() == optimizer_tensors(by_torch, theirs.items()).keys()
            for key, value in now.items():
                value.copy_(kept[key])
            update(by_apex, ours, steps)
    same(ours, theirs)


def sharded() -> None:
    mesh = init_device_mesh("cpu", (2,))
    ours, theirs = start(mesh), start(mesh)
    update(build_optimizer(theirs.items(), config("adamw", "auto")), theirs, range(3))
    with installed(NEWEST):
        update(build_optimizer(ours.items(), config("adamw", "apex")), ours, range(3))
    same({n: Parameter(p.to_local()) for n, p in ours.items()},  # type: ignore[attr-defined]
         {n: Parameter(p.to_local()) for n, p in theirs.items()})  # type: ignore[attr-defined] # fmt: skip


def test_parts_of_sharded_parameters(ranks: RankPool) -> None:
    ranks.run(sharded)


def test_uneven_counts_of_updates_are_refused() -> None:
    with installed(NEWEST):
        one = {n: Parameter(torch.ones(3)) for n in ("a", "b")}
        optimizer = build_optimizer(one.items(), AdamWConfig(fused="apex"))
        one["a"].grad = torch.ones(3)
        optimizer.step()
        one["b"].grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="fused: auto"):
            optimizer.step()


def test_where_it_cannot_run_torch_does_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = build_optimizer(start().items(), config("adamw", "apex"))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert "apex runs on CUDA only, not on cpu; torch's update runs" in caplog.text
