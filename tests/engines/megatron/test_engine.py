"""Every layout of the megatron engine computes what the plain engine computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.config.schema import AdamWConfig
from shardwise.engines.base import Engine, Setup
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.plain import PlainEngine
from shardwise.engines.plain_config import PlainConfig
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.parallel.layout import parse_layout
from tests.support import toy
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

STEPS, LR, CPU = 3, 1e-2, torch.device("cpu")
OPTIMIZER = AdamWConfig(lr=LR, eps=1e-4)


def megatron(layout: str, model: Any, precision: str, **options: Any) -> Engine:
    config = MegatronConfig(kind="megatron", layout=layout, precision=precision, cpu_shim=True)
    parsed = parse_layout(layout, dist.get_world_size())
    return build_engine(Setup(model, config, parsed, CPU, 7, "test", OPTIMIZER, **options))


def plain(model: Any, precision: str, **options: Any) -> PlainEngine:
    config = PlainConfig(kind="plain", precision=precision)
    return PlainEngine(
        Setup(model, config, parse_layout("dp1", 1), CPU, 7, "test", OPTIMIZER, **options)
    )


def train(it: Engine, cuts: list[int] | None = None) -> dict[str, Any]:
    """Three steps; metrics, gradients of the first, norms, weights, moments and log-probabilities.

    ``cuts``: micro-batches of each data rank.
    """
    out: dict[str, Any] = {"metrics": [], "norms": []}
    for step in range(STEPS):
        share = toy.batch(8, seed=step).split(8 // it.data_size)[max(it.data_rank, 0)]
        parts = share.split(8 if cuts is None else -(-share.num_rows // cuts[it.data_rank]))
        out["metrics"].append(it.forward_backward(parts, CausalLM(accuracy=True)))
        if step == 0:
            out["gradient"] = copies(it, "grads")
        out["norms"].append(it.step(LR))
    for kind in ("weights", *it.optimizer_states()):
        out[kind] = copies(it, kind)
    [out["logprobs"]] = it.forward([toy.batch(8, seed=9)], valid_logprobs)
    out["hf"] = {n: t.clone() for n, t in it.weights()}
    it.close()
    return out


def copies(it: Engine, kind: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in it.full(kind)}


def on_rank(layout: str, model: Any, precision: str, cuts: list[int] | None) -> dict[str, Any]:
    return train(megatron(layout, model, precision), cuts)


def assert_same(mine: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    for a, b in zip(mine["metrics"], wanted["metrics"], strict=True):
        assert a == pytest.approx(b, rel=bound)
    assert mine["norms"] == pytest.approx(wanted["norms"], rel=bound)
    assert torch.allclose(mine["logprobs"], wanted["logprobs"], rtol=0, atol=bound * 10)
    for part in ("gradient", "weights", "exp_avg", "exp_avg_sq", "hf"):
        floor = 1e-6 * max(v.norm() for v in wanted[part].values())
        assert mine[part].keys() == wanted[part].keys()
        for name, value in wanted[part].items():
            error = (mine[part][name] - value).norm() / value.norm().clamp_min(floor)
            assert error < bound, f"{part} {name}: {error:.2e}"


LAYOUTS = [
    ("dp1", 1, [3]),
    ("dp2.zero0", 2, [2, 2]),
    ("dp2.zero1", 2, [1, 4]),
    ("tp2", 2, [2]),
    ("tp2.sp", 2, [2]),
    ("pp2", 2, [3]),
    ("pp2.v2.interleaved", 2, [3]),
    ("cp2.ring", 2, [2]),
    ("cp2.ulysses", 2, [2]),
]


@pytest.mark.parametrize("layout,world,cuts", LAYOUTS)
@pytest.mark.parametrize("precision,bound", [("fp64", 1e-9), ("fp32", 2e-5)])
def test_layouts_equal_the_plain_engine(
    ranks: RankPool, layout: str, world: int, cuts: list[int], precision: str, bound: float
) -> None:
    model = toy.llama(num_layers=4, qk_norm=True, qkv_bias=True)
    wanted = train(plain(model, precision))
    for mine in ranks.run(on_rank, layout, model, precision, cuts, world=world):
        assert_same(mine, wanted, bound)
