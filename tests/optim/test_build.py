"""Optimizers against the update rules written out, and their state through a round trip."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardwise.config.optimizers import AdamConfig, AdamWConfig, SgdConfig
from shardwise.errors import ConfigError
from shardwise.optim import torch_kinds
from shardwise.optim.build import build_optimizer, check_groups, optimizer_tensors, set_lr
from shardwise.optim.torch_kinds import ensure_state
from tests.support.pool import RankPool

KINDS = {"adamw": AdamWConfig, "adam": AdamConfig, "sgd": SgdConfig}


def config(kind: str = "adamw", **settings: Any) -> Any:
    return KINDS[kind](**{"kind": kind, "no_decay": [], "lr": 0.01, **settings})


def by_hand(c: Any, start: Tensor, grads: list[Tensor]) -> Tensor:
    """The update rules of the papers, one tensor, in the order of their algorithms."""
    p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, raw in enumerate(grads, start=1):
        g = raw if c.kind == "adamw" else raw + c.weight_decay * p
        if c.kind == "sgd":
            m = c.momentum * m + g
            p = p - c.lr * (g + c.momentum * m if c.nesterov else m)
            continue
        m = c.beta1 * m + (1 - c.beta1) * g
        v = c.beta2 * v + (1 - c.beta2) * g * g
        step = (m / (1 - c.beta1**t)) / ((v / (1 - c.beta2**t)).sqrt() + c.eps)
        decay = c.lr * c.weight_decay * p if c.kind == "adamw" else 0.0
        p = p - decay - c.lr * step
    return p


CASES = [
    config(kind="adamw", weight_decay=0.1),
    config(kind="adamw", weight_decay=0.0, beta1=0.5, beta2=0.9),
    config(kind="adam", weight_decay=0.1),
    config(kind="sgd", weight_decay=0.1),
    config(kind="sgd", momentum=0.0, weight_decay=0.0),
    config(kind="sgd", nesterov=True, weight_decay=0.1),
]


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.kind}-{c.weight_decay}-{getattr(c, 'nesterov', '')}"
)
def test_updates_follow_the_papers(
    case: Any, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_kinds, "choose_implementation", lambda *_: implementation)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    grads = [torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(6)]
    param = nn.Parameter(start.clone())
    optimizer = build_optimizer([("w", param)], case)
    assert optimizer.param_groups[0][implementation]
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(param.data, by_hand(case, start, grads), rtol=0, atol=1e-12)


def test_zero_state_up_front_equals_torch_starting_by_itself() -> None:
    for case in CASES:
        ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
        first = build_optimizer([("w", ours)], case)
        second = build_optimizer([("w", theirs)], case)
        second.state.clear()
        for step in range(4):
            for p, o in ((ours, first), (theirs, second)):
                p.grad = torch.linspace(1, -2, 7) * (step + 1)
                o.step()
        assert torch.equal(ours, theirs)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


def test_decay_groups_by_name() -> None:
    optimizer = build_optimizer(Small().named_parameters(), AdamWConfig())
    found = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert found == {
        "proj.weight": 0.1,
        "embed_tokens.weight": 0.0,
        "proj.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
    }
    only = build_optimizer(Small().named_parameters(), AdamWConfig(no_decay=["proj.*", "zz*"]))
    assert {n for g in only.param_groups if not g["weight_decay"] for n in g["param_names"]} == {
        "proj.weight",
        "proj.bias",
    }


def test_groups_have_rates_and_decays_of_their_own() -> None:
    groups = [
        {"match": "proj.*", "lr": 0.02, "weight_decay": 0.3},
        {"match": "*.weight", "lr_scale": 0.5},
    ]
    c = config(groups=groups, no_decay=["*bias"], weight_decay=0.1)
    optimizer = build_optimizer(Small().named_parameters(), c)
    set_lr(optimizer, 0.001)
    found = {
        n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]
    }
    assert found == {
        "proj.weight": (0.002, 0.3),  # the first group that matches, at its share of the peak
        "proj.bias": (0.002, 0.0),  # no_decay holds in groups, too
        "embed_tokens.weight": (0.0005, 0.1),
        "norm.weight": (0.0005, 0.1),
        "norm.bias": (0.001, 0.0),
    }
    assert c.with_rate(0.1).groups[0].lr == pytest.approx(0.2)
    names = [n for n, _ in Small().named_parameters()]
    check_groups(c, names, "optimizer.groups")
    lost = config(groups=[*groups, {"match": "proj.weights", "lr_scale": 2.0}])
    with pytest.raises(ConfigError, match=r"proj.weights.*did you mean 'proj.weight'"):
        check_groups(lost, names, "optimizer.groups")
    for wrong in ({"match": "*"}, {"match": "*", "lr": 1.0, "lr_scale": 1.0}, {"lr": 1.0}):
        with pytest.raises(ValidationError):
            config(groups=[wrong])


def test_frozen_parameters_are_left_out_and_nothing_to_train_is_an_error() -> None:
    model = Small()
    model.embed_tokens.weight.requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), AdamWConfig())
    names = optimizer_tensors(optimizer, model.named_parameters())
    assert not any("embed" in n for n in names)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        build_optimizer(model.named_parameters(), AdamWConfig())
    with pytest.raises(ValidationError, match="momentum"):
        config(kind="sgd", nesterov=True, momentum=0.0)


def test_state_names() -> None:
    param = nn.Parameter(torch.zeros(2))
    expected = {
        "adamw": ["exp_avg", "exp_avg_sq", "step"],
        "adam": ["exp_avg", "exp_avg_sq", "step"],
        "sgd": ["momentum_buffer"],
    }
    for kind, keys in expected.items():
        optimizer = build_optimizer([("a.w", param)], config(kind=kind))
        tensors = optimizer_tensors(optimizer, [("a.w", param)])
        assert sorted(tensors) == [f"optim.a.w.{k}" for k in keys]
        assert all(not t.any() for t in tensors.values())
    assert not optimizer_tensors(
        build_optimizer([("w", param)], config(kind="sgd", momentum=0.0)), [("w", param)]
    )


def test_ensure_state_keeps_what_is_there_and_set_lr_reaches_all_groups() -> None:
    model = Small()
    optimizer = build_optimizer(model.named_parameters(), AdamWConfig())
    tensors = optimizer_tensors(optimizer, model.named_parameters())
    tensors["optim.proj.weight.exp_avg"].fill_(3.0)
    ensure_state(optimizer)
    again = optimizer_tensors(optimizer, model.named_parameters())
    assert again["optim.proj.weight.exp_avg"] is tensors["optim.proj.weight.exp_avg"]
    assert bool((again["optim.proj.weight.exp_avg"] == 3.0).all())
    set_lr(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]


def test_fused_on_cpu_and_foreach_where_fused_fails() -> None:
    param = nn.Parameter(torch.zeros(2))
    assert build_optimizer([("w", param)], config()).param_groups[0]["fused"]

    def refuses(params: Any, fused: bool = False, **settings: Any) -> torch.optim.Optimizer:
        if fused:
            raise RuntimeError("no fused kernel here")
        return torch.optim.AdamW(params, **settings)

    assert torch_kinds.choose_implementation(refuses, [param]) == "foreach"


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.linspace(-1, 1, 8).reshape(2, 4) * (step + 1)
        model(x).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def sharded(world: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def round_trip(kind: str, world: int) -> bool:
    """Six steps at once, and three, a copy of all tensors into fresh objects, three: bitwise."""
    c = config(kind=kind, no_decay=["*bias"])
    whole, first, second = (sharded(world) for _ in range(3))
    optimizers = [build_optimizer(m.named_parameters(), c) for m in (whole, first, second)]
    # torch 2.13 has no rule for sharding the fused SGD kernel; the capability test finds out.
    fused = kind != "sgd" or world == 1
    assert all(bool(g["fused"]) == fused for o in optimizers for g in o.param_groups)
    train(whole, optimizers[0], range(6))
    train(first, optimizers[1], range(3))
    source = optimizer_tensors(optimizers[1], first.named_parameters())
    target = optimizer_tensors(optimizers[2], second.named_parameters())
    assert source.keys() == target.keys()
    with torch.no_grad():
        for name, tensor in target.items():
            local(tensor).copy_(local(source[name]))
        for a, b in zip(second.parameters(), first.parameters()):
            local(a).copy_(local(b))
    train(second, optimizers[2], range(3, 6))
    resumed = optimizer_tensors(optimizers[2], second.named_parameters())
    unbroken = optimizer_tensors(optimizers[0], whole.named_parameters())
    same = all(torch.equal(local(resumed[n]), local(unbroken[n])) for n in resumed)
    return same and all(
        torch.equal(local(a), local(b)) for a, b in zip(second.parameters(), whole.parameters())
    )


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_state_round_trip_is_bitwise(kind: str) -> None:
    assert round_trip(kind, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_counter_lies_where_torch_puts_it() -> None:
    for implementation in ("fused", "foreach"):
        ours, theirs = (nn.Parameter(torch.ones(3, device="cuda")) for _ in range(2))
        optimizers = [torch.optim.AdamW([p], **{implementation: True}) for p in (ours, theirs)]  # type: ignore[arg-type]
        ensure_state(optimizers[0])
        for p, optimizer in zip((ours, theirs), optimizers):
            p.grad = torch.ones_like(p)
            optimizer.step()
        steps = [o.state[p]["step"] for p, o in zip((ours, theirs), optimizers)]
        assert steps[0].device == steps[1].device
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_state_round_trip_is_bitwise_when_sharded(ranks: RankPool, kind: str) -> None:
    assert ranks.run(round_trip, kind, 2, world=2) == [True, True]


def sharded_equals_single(kind: str, world: int) -> float:
    c = config(kind=kind)
    many, one = sharded(world), sharded(1)
    for model in (many, one):
        train(model, build_optimizer(model.named_parameters(), c), range(4))
    gaps = [
        (a.full_tensor() - b).abs().max().item()  # type: ignore[attr-defined]
        for a, b in zip(many.parameters(), one.parameters())
    ]
    return max(gaps)


def test_sharded_update_equals_one_process(ranks: RankPool) -> None:
    """Same input on both ranks, so the averaged gradient is the single one."""
    assert max(ranks.run(sharded_equals_single, "adamw", 2, world=2)) < 1e-6
