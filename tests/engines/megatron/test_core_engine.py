"""Megatron's own optimizer on every layout: what it computes, keeps and lets others read."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.config.optimizers import AdamConfig, AdamWConfig, ParameterGroup, SgdConfig
from shardwise.engines.base import Engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops.local_shards import local_shards
from tests.engines.megatron.test_engine import (
    GPT2,
    LLAMA,
    SCALAR,
    UNTIED,
    Case,
    assert_same,
    batch,
    megatron,
    name_of,
    on_rank,
    plain,
    train,
)
from tests.support import toy
from tests.support.daily import daily
from tests.support.engines import LR, assert_near, copies
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

# Of parameters that Megatron holds for themselves; decay for norms, none for keys and queries.
GROUPS = [
    ParameterGroup(match="*.attn.o.*", weight_decay=0.5),
    ParameterGroup(match="*.down.*", lr=5e-3),
]
OWN: dict[str, Any] = {"groups": GROUPS, "no_decay": ["*.attn.[qkv].*", "*embed*"], "lr": LR}
ADAMW = AdamWConfig(eps=1e-4, **OWN)
ADAM = AdamConfig(kind="adam", eps=1e-4, **OWN)
SGD = SgdConfig(kind="sgd", momentum=0.9, **OWN)
PLAIN_SGD = SgdConfig(kind="sgd", momentum=0.0, **OWN)


def case(layout: str, model: Any, optimizer: Any = ADAMW, precision: str = "fp64") -> Case:
    cuts = (2, 2) if "dp2" in layout else (2,) * 4
    return Case(layout, model, precision, cuts, optimizer, whose="megatron", clip=0.1)


CASES = [
    case("dp2.zero1", LLAMA),
    case("dp2.zero0", LLAMA),
    case("tp2.sp", UNTIED, SGD),
    case("pp2", LLAMA, SGD),
    case("tp2", LLAMA, ADAM),
    case("dp2.zero1", GPT2),
    case("tp2", GPT2, PLAIN_SGD),
    case("pp2", UNTIED),
    case("pp2.v2.interleaved", LLAMA),
    case("cp2.ring", UNTIED),
    case("zero0.cp2.ulysses", LLAMA, SGD),
    case("tp2.sp", SCALAR),
    case("dp2.zero1", LLAMA, ADAMW, "fp32"),
    case("dp2.zero1", LLAMA, ADAMW, "bf16"),
    case("dp2.zero0", UNTIED, SGD, "bf16"),
    case("dp2.zero1", UNTIED, ADAMW, "fp16"),
]
FOUR = [
    case("dp2.zero1.tp2.sp", LLAMA),
    case("dp2.zero1.pp2", LLAMA),
    case("dp2.zero0.pp2", LLAMA, SGD),
    case("dp4.zero1", UNTIED),
    case("dp2.zero1.cp2.ring", LLAMA),
    case("dp2.zero1.pp2.v2.interleaved", LLAMA),
]
BOUNDS = {"fp64": 1e-9, "fp32": 2e-5, "bf16": 0.2, "fp16": 0.05}


@pytest.mark.parametrize("asked", daily(CASES, 0, 3), ids=map(name_of, CASES))
def test_layouts_equal_the_plain_engine(ranks: RankPool, asked: Case) -> None:
    wanted = train(plain(asked), dataclasses.replace(asked, cuts=(1,)))
    for mine in ranks.run(on_rank, asked, world=2):
        assert_same(mine, wanted, BOUNDS[asked.precision])


@pytest.mark.slow
@pytest.mark.parametrize("asked", FOUR, ids=map(name_of, FOUR))
def test_layouts_of_four_ranks_equal_the_plain_engine(ranks: RankPool, asked: Case) -> None:
    wanted = train(plain(asked), dataclasses.replace(asked, cuts=(1,)))
    for mine in ranks.run(on_rank, asked, world=4):
        assert_same(mine, wanted, 1e-9)


# --- what it keeps, and who may write into it -----------------------------------------------------


def storages() -> dict[int, int]:
    """Bytes by address, of all dense tensors of this process."""
    found = (
        t.untyped_storage() for t in gc.get_objects() if type(t) in (Tensor, torch.nn.Parameter)
    )
    return {s.data_ptr(): s.nbytes() for s in found}


def bytes_of(asked: Case) -> int:
    """Of an engine whose second update is due."""
    gc.collect()
    before = storages()
    it = megatron(asked)
    for step in range(2):
        it.forward_backward([batch(asked, step).split(4)[dist.get_rank()]], CausalLM())
        if not step:
            it.step(LR)
    gc.collect()
    found = sum(size for place, size in storages().items() if place not in before)
    it.close()
    return found


@pytest.mark.parametrize("precision", daily(["fp32", "bf16"], 0))
def test_weights_are_kept_once(ranks: RankPool, precision: str) -> None:
    """With ZeRO-1 on two ranks, bytes a parameter.

    fp32: 4 that compute, masters among them, 4 of gradients, half of 8 of moments. bf16: 2, 4, and
    half of 12 of masters and moments. Ours has masters and their gradients for itself.
    """
    wide = toy.llama(hidden_size=64, ffn_size=256, num_layers=4)
    asked = Case("dp2.zero1", wide, precision, whose="megatron")
    size = sum(t.numel() for t in copies(plain(asked), "weights").values())
    found = ranks.run(bytes_of, asked, world=2)
    ours = ranks.run(bytes_of, dataclasses.replace(asked, whose="native"), world=2)
    wanted = {"fp32": 16, "bf16": 14}[precision]
    assert [n / size for n in found] == pytest.approx([12, 12], rel=0.05)
    assert [n / size for n in ours] == pytest.approx([wanted] * 2, rel=0.05)


def written_into(asked: Case) -> dict[str, Any]:
    """Weights are doubled in place where they are held, and one is loaded; then all compute."""
    it = megatron(asked)
    before = copies(it, "weights")
    for name, weight in it.held("weights"):
        for shard in local_shards(name, weight):
            shard.view.mul_(2)
    [out] = it.forward([batch(asked, 0)], valid_logprobs)
    doubled = copies(it, "weights")
    it.load_weights((name, weight) for name, weight in before.items())
    [back] = it.forward([batch(asked, 0)], valid_logprobs)
    it.close()
    return {"before": before, "doubled": doubled, "out": out, "back": back}


@pytest.mark.parametrize(
    "asked", daily([case("dp2.zero1", LLAMA), case("tp2", LLAMA, precision="bf16")], 0), ids=name_of
)
def test_what_is_written_into_masters_computes(ranks: RankPool, asked: Case) -> None:
    it: Engine = plain(asked)
    [back] = it.forward([batch(asked, 0)], valid_logprobs)
    it.load_weights((name, 2 * weight) for name, weight in list(copies(it, "weights").items()))
    [out] = it.forward([batch(asked, 0)], valid_logprobs)
    bound = 1e-9 if asked.precision == "fp64" else 0.2
    for mine in ranks.run(written_into, asked, world=2):
        assert_near(mine["doubled"], {n: 2 * t for n, t in mine["before"].items()}, 1e-12)
        assert_near({"out": mine["out"], "back": mine["back"]}, {"out": out, "back": back}, bound)


def ours_instead(asked: Case) -> tuple[list[Any], list[Any], dict[str, Any]]:
    it = megatron(asked)
    events = it.events(), it.events()
    return *events, train(it, asked)


def test_where_its_optimizer_cannot_ours_updates_and_says_so(ranks: RankPool) -> None:
    split = AdamWConfig(lr=LR, groups=[ParameterGroup(match="*.attn.q.*", weight_decay=0.5)])
    asked = Case("tp2", LLAMA, optimizer=split)
    wanted = train(plain(asked), dataclasses.replace(asked, cuts=(1,)))
    for told, again, mine in ranks.run(ours_instead, asked, world=2):
        assert [kind for kind, _ in told] == ["megatron"] and again == []
        assert "layers.0.attn.q.weight" in told[0][1] and told[0][1].endswith("ours updates")
        assert_same(mine, wanted, 1e-9)


# --- a fused optimizer, which counts by group -----------------------------------------------------


class Fused(torch.optim.Optimizer):
    """As Transformer Engine's `FusedAdam`: states by parameter, the counter by group."""

    def __init__(self, params: Any, adam_w_mode: bool = True, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Loshchilov and Hutter 2019, algorithm 2."""
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            (b1, b2), step = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                m, v = state["exp_avg"], state["exp_avg_sq"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                root = (v / (1 - b2**step)).sqrt_().add_(group["eps"])
                p.addcdiv_(m, root, value=-group["lr"] / (1 - b1**step))


def moved(asked: Case) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Updates by a fused optimizer, one by torch's in its place, and by a fused one again."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    found, kept, meta = [], {}, {}
    for number, fused in enumerate((True, False, True)):
        stand_in = Fused if fused else torch.optim.AdamW
        with (
            mock.patch.object(optimizer, "Adam", stand_in),
            mock.patch.object(optimizer, "USING_PYTORCH_OPTIMIZER", not fused),
            mock.patch.object(distrib_optimizer, "Adam", stand_in),
        ):
            it = megatron(asked)
        state = it.state_dict()
        for name, values in kept.items():
            for shard, value in zip(local_shards(name, state.tensors[name]), values, strict=True):
                shard.view.copy_(value)
        it.load_state_dict(meta or state.meta)
        share = batch(asked, number).split(8 // it.data_size)[it.data_rank]
        it.forward_backward([share], CausalLM())
        it.step(LR)
        state = it.state_dict()
        kept = {n: [s.view.clone() for s in local_shards(n, t)] for n, t in state.tensors.items()}
        meta = state.meta
        found.append((copies(it, "weights"), copies(it, "exp_avg_sq")))
        steps = {float(t) for n, t in state.tensors.items() if n.endswith(".step")}
        assert steps == {number + 1.0}
        it.close()
    return found


@pytest.mark.slow
def test_a_fused_optimizer_goes_on_from_another(ranks: RankPool) -> None:
    asked = case("dp2.zero1", LLAMA)
    it = plain(asked)
    wanted = []
    for number in range(3):
        it.forward_backward([batch(asked, number)], CausalLM())
        it.step(LR)
        wanted.append((copies(it, "weights"), copies(it, "exp_avg_sq")))
    for mine in ranks.run(moved, asked, world=2):
        for a, b in zip(mine, wanted, strict=True):
            for tensors, others in zip(a, b, strict=True):
                assert_near(tensors, others, 1e-9)
