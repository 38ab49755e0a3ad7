"""Any kind of engine beside the plain one: the same updates, and what came of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.config.schema import AdamWConfig, EngineConfig
from shardwise.engines.base import Engine, Setup
from shardwise.engines.plain import PlainEngine
from shardwise.engines.plain_config import PlainConfig
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.parallel.layout import parse_layout
from tests.support import toy

STEPS, LR, ROWS, CPU = 3, 1e-2, 8, torch.device("cpu")
OPTIMIZER = AdamWConfig(lr=LR, eps=1e-4)


def engine(config: EngineConfig, model: Any, **options: Any) -> Engine:
    """One over all ranks of the world, on the layout that its config names."""
    layout = parse_layout(config.layout, dist.get_world_size())
    return build_engine(
        Setup(model, config, layout, CPU, 7, "test", **{"optimizer": OPTIMIZER, **options})
    )


def plain(model: Any, precision: str = "fp64", **options: Any) -> PlainEngine:
    """The oracle."""
    config = PlainConfig(kind="plain", precision=precision)
    options = {"optimizer": OPTIMIZER, **options}
    return PlainEngine(Setup(model, config, parse_layout("dp1", 1), CPU, 7, "test", **options))


def update(it: Engine, step: int, cuts: list[int] | None = None) -> dict[str, float]:
    """Gradients of one global batch; ``cuts``: micro-batches of each data rank."""
    share = toy.batch(ROWS, seed=step).split(ROWS // it.data_size)[max(it.data_rank, 0)]
    parts = share.split(ROWS if cuts is None else -(-share.num_rows // cuts[it.data_rank]))
    return it.forward_backward(parts, CausalLM(accuracy=True))


def copies(it: Engine, kind: str) -> dict[str, Tensor]:
    """Full tensors of a kind."""
    return {name: value.clone() for name, value in it.full(kind)}


def train(it: Engine, cuts: list[int] | None = None) -> dict[str, Any]:
    """Three updates: metrics, first gradients, norms, weights, moments and log-probabilities."""
    out: dict[str, Any] = {"metrics": [], "norms": []}
    for step in range(STEPS):
        out["metrics"].append(update(it, step, cuts))
        if step == 0:
            out["gradient"] = copies(it, "grads")
        out["norms"].append(it.step(LR))
    for kind in ("weights", *it.optimizer_states()):
        out[kind] = copies(it, kind)
    [out["logprobs"]] = it.forward([toy.batch(ROWS, seed=9)], valid_logprobs)
    out["hf"] = {name: value.clone() for name, value in it.weights()}
    it.close()
    return out


def assert_same(mine: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    """Everything of `train`, within ``bound`` of its norm."""
    for a, b in zip(mine["metrics"], wanted["metrics"], strict=True):
        assert a == pytest.approx(b, rel=bound)
    assert mine["norms"] == pytest.approx(wanted["norms"], rel=bound)
    assert torch.allclose(
        mine["logprobs"].double(), wanted["logprobs"].double(), rtol=0, atol=bound * 10
    )
    for part in ("gradient", "weights", "exp_avg", "exp_avg_sq", "hf"):
        assert mine[part].keys() == wanted[part].keys()
        assert_near(mine[part], wanted[part], bound, part)


def assert_near(
    mine: dict[str, Tensor], wanted: dict[str, Tensor], bound: float, what: str = ""
) -> None:
    """Tensors by name, each within ``bound`` of its norm."""
    floor = 1e-6 * max(v.norm() for v in wanted.values())
    for name, value in wanted.items():
        error = (mine[name].double() - value.double()).norm() / value.norm().clamp_min(floor)
        assert error < bound, f"{what} {name}: {error:.2e}"
