"""Our own kinds against references from the papers, and published implementations of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardwise.config.schema import StageConfig
from shardwise.engines import plain_groups
from shardwise.engines.plain_optimizers import tree
from shardwise.optim.blockwise import code_map
from shardwise.optim.build import build_optimizer, optimizer_tensors, set_lr
from shardwise.optim.muon import orthogonalised

KINDS: dict[str, dict[str, Any]] = {
    "lion": {},
    "muon": {},
    "muon-spectral": {"scale": "spectral", "nesterov": False},
    "adafactor": {"clip_threshold": 1.5},
    "adamw8bit": {},
    "schedule_free": {},
}
SHAPES = {"w.weight": (70, 64), "embed.weight": (9, 4), "norm.weight": (6,), "w.bias": (5,)}
GROUPS = [{"match": "w.*", "lr_scale": 0.5, "weight_decay": 0.2}]


def config(kind: str, **keys: Any) -> Any:
    optimizer = {"kind": kind.partition("-")[0], **KINDS.get(kind, {}), **keys}
    stage = {"kind": "any", "steps": 1, "optimizer": optimizer}
    return StageConfig.model_validate(stage).optimizer


def grads(step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    return {n: torch.randn(shape, generator=g, dtype=dtype) for n, shape in SHAPES.items()}


def run(
    build: Any, c: Any, steps: range, named: dict[str, Parameter], optimizer: Any = None
) -> Any:
    """Updates on given gradients, as an engine calls for them."""
    optimizer = build(named, c) if optimizer is None else optimizer
    for step in steps:
        if hasattr(optimizer, "begin"):
            optimizer.begin()
        for name, grad in grads(step, next(iter(named.values())).dtype).items():
            named[name].grad = grad
        set_lr(optimizer, c.lr * (1 - 0.1 * step))
        optimizer.step()
        if hasattr(optimizer, "end"):
            optimizer.end()
    return optimizer


def start() -> dict[str, Parameter]:
    return {name: Parameter(value) for name, value in grads(99).items()}


def ours(named: dict[str, Parameter], c: Any) -> torch.optim.Optimizer:
    return build_optimizer(named.items(), c)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_the_references(kind: str) -> None:
    c = config(kind, lr=0.01, groups=GROUPS)
    native, plain = start(), start()
    one = run(ours, c, range(4), native)
    other = run(plain_groups.build_optimizer, c, range(4), plain)
    for name in SHAPES:
        torch.testing.assert_close(native[name], plain[name], rtol=1e-12, atol=1e-13)
        states = [o.state[p[name]] for o, p in ((one, native), (other, plain))]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert value.shape == states[1][key].shape
            torch.testing.assert_close(value, states[1][key], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["lomo", "adalomo"])
def test_weights_move_in_the_backward_pass_as_the_references_do_behind_it(kind: str) -> None:
    c = config(kind, lr=0.01, groups=GROUPS)
    native, plain = start(), start()
    optimizer: Any = ours(native, c)
    optimizer.attach(lambda p: p is native["w.bias"])  # whose gradient is not whole yet
    for step in range(4):
        set_lr(optimizer, c.lr * (1 - 0.1 * step))
        optimizer.arm()
        given = grads(step)
        torch.stack([(native[n] * g).sum() for n, g in given.items()]).sum().backward()
        assert [n for n, p in native.items() if p.grad is not None] == ["w.bias"]
        squares = sum(float(s) for s in optimizer.squares.values())
        wanted = sum(float(g.square().sum()) for n, g in given.items() if n != "w.bias")
        assert squares == pytest.approx(wanted)
        optimizer.step()
        native["w.bias"].grad = None
    other = run(plain_groups.build_optimizer, c, range(4), plain)
    for name in SHAPES:
        torch.testing.assert_close(native[name], plain[name], rtol=1e-12, atol=1e-13)
        for key, value in other.state[plain[name]].items():
            torch.testing.assert_close(optimizer.state[native[name]][key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_an_unbroken_one(kind: str) -> None:
    c = config(kind, lr=0.01)
    whole, first, second = start(), start(), start()
    run(ours, c, range(4), whole)
    saved = optimizer_tensors(run(ours, c, range(2), first), first.items())
    fresh = ours(second, c)
    for name, tensor in optimizer_tensors(fresh, second.items()).items():
        tensor.copy_(saved[name])
    for name, param in second.items():
        param.data.copy_(first[name])
    run(ours, c, range(2, 4), second, fresh)
    assert all(torch.equal(whole[n], second[n]) for n in SHAPES)


def test_an_update_left_out_leaves_the_average_where_it_was() -> None:
    named = start()
    optimizer: Any = run(ours, config("schedule_free", lr=0.01), range(2), named)
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer.begin()
    assert not torch.equal(named["w.weight"], before["w.weight"])
    optimizer.end()
    for name, value in before.items():
        torch.testing.assert_close(named[name].data, value, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["schedule_free", "lomo"])
def test_whoever_hooks_into_steps_hears_before_weights_move(kind: str) -> None:
    """A save on a signal takes the weights as they are between updates, or waits."""
    named, heard = start(), []
    optimizer: Any = ours(named, config(kind))
    before = named["w.weight"].detach().clone()
    hook = register_optimizer_step_pre_hook(
        lambda *_: heard.append(torch.equal(before, named["w.weight"]))
    )
    try:
        if kind == "lomo":
            optimizer.attach(lambda _: False)
            optimizer.arm()
            named["w.weight"].sum().backward()
        else:
            optimizer.state[named["w.weight"]]["step"] += 1
            optimizer.begin()
    finally:
        hook.remove()
    assert heard == [True] and not torch.equal(before, named["w.weight"])


def test_code_maps_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed)
        torch.testing.assert_close(code_map(signed), theirs, rtol=1e-6, atol=1e-9)
        assert tree(signed) == pytest.approx(theirs.tolist(), rel=1e-6, abs=1e-9)


def test_eight_bits_are_a_quarter_of_the_bytes_and_blocks_are_of_256() -> None:
    named = start()
    optimizer = ours(named, config("adamw8bit"))
    state = optimizer.state[named["w.weight"]]
    held = sum(t.numel() * t.element_size() for n, t in state.items() if n != "step")
    assert state["exp_avg_absmax"].shape == (18,)  # 70 * 64 / 256, the last one half full
    fp32 = {"codes": 2 * 4480, "absmax": 2 * 18 * 8}  # of fp64 weights
    assert held == sum(fp32.values())
    assert "exp_avg" in optimizer.state[named["embed.weight"]]


def test_newton_schulz_brings_singular_values_near_one() -> None:
    for shape in ((12, 30), (30, 12)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
        values = torch.linalg.svdvals(orthogonalised(matrix, 5))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    theirs = torch.optim.Muon([p := Parameter(matrix.float())], lr=1.0, weight_decay=0.0)
    p.grad = matrix.float()
    theirs.step()
    moved = orthogonalised(matrix, 5).float() * (30 / 12) ** 0.5
    torch.testing.assert_close(matrix.float() - p, moved, rtol=0, atol=0.1)  # theirs is bf16


def test_published_implementations_agree() -> None:
    """Lion's code in the paper, and schedulefree's AdamW where it is installed."""
    schedulefree = pytest.importorskip("schedulefree")
    c = config("schedule_free", lr=0.01, weight_decay=0.1, no_decay=[])
    named, theirs = start(), start()
    run(ours, c, range(4), named)
    other = schedulefree.AdamWScheduleFree(
        theirs.values(), lr=0.01, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=0.1,
        weight_lr_power=2.0, foreach=False,
    )  # fmt: skip
    other.train()
    for step in range(4):
        for name, grad in grads(step).items():
            theirs[name].grad = grad
        for group in other.param_groups:
            group["lr"] = c.lr * (1 - 0.1 * step)
        other.step()
    other.eval()
    for name in SHAPES:
        torch.testing.assert_close(named[name], theirs[name], rtol=1e-9, atol=1e-11)
