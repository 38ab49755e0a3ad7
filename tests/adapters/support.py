"""Engines with adapters, on tiny models, that several files here share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from shardwise.adapters.trained import Trained
from shardwise.config import registry
from shardwise.config.adapters import AdapterConfig, FreezeConfig
from shardwise.config.optimizers import AdamWConfig
from shardwise.config.registry import discover
from shardwise.config.schema import NativeConfig
from shardwise.engines.base import Engine, Setup
from shardwise.engines.plain import PlainEngine
from shardwise.engines.plain_config import PlainConfig
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel.layout import parse_layout
from shardwise.verify.roles import world_of
from tests.support import toy
from tests.support.pool import RankPool

LR, ROWS, UPDATES = 1e-2, 4, 2
CPU = torch.device("cpu")


def adapter(kind: str = "lora", **keys: Any) -> AdapterConfig:
    """Small, unless ``keys`` say otherwise."""
    discover()
    fields = {"kind": kind} | ({"size": 6} if kind == "bottleneck" else {"rank": 4}) | keys
    found: AdapterConfig = registry.ADAPTER_CONFIGS[kind].model_validate(fields)
    return found


def trained(asked: AdapterConfig | FreezeConfig) -> Trained:
    """As a stage has it."""
    return Trained(freeze=asked) if isinstance(asked, FreezeConfig) else Trained(asked)


def plain(model: Any, asked: Any, precision: str = "fp64", **keys: Any) -> PlainEngine:
    """The oracle, its adapter started."""
    config = PlainConfig.model_validate({"kind": "plain", "precision": precision, **keys})
    optimizer = AdamWConfig(lr=LR, eps=1e-4)
    layout = parse_layout("dp1", 1)
    engine = PlainEngine(
        Setup(model, config, layout, CPU, 7, "test", optimizer, trained=trained(asked))
    )
    engine.start_adapter()
    return engine


def native(model: Any, asked: Any, layout: str = "dp1", **keys: Any) -> Engine:
    """The native engine on the ranks at hand, its adapter started."""
    fields = {"layout": layout, "precision": "fp64", "compile": False, **keys}
    config = NativeConfig.model_validate(fields)
    parsed = parse_layout(layout, dist.get_world_size())
    optimizer = AdamWConfig(lr=LR, eps=1e-4)
    engine = build_engine(
        Setup(model, config, parsed, CPU, 7, "test", optimizer, trained=trained(asked))
    )
    engine.start_adapter()
    return engine


def update(engine: Engine, seed: int, micro: int = ROWS) -> dict[str, Any]:
    """Loss, norm and gradients of an update on this rank's rows."""
    batch = toy.batch(ROWS, 16, seed=seed)
    mine = batch.split(ROWS // engine.data_size)[engine.data_rank].split(micro)
    found: dict[str, Any] = {"loss": engine.forward_backward(mine, CausalLM())["loss"]}
    found |= {f"gradient {n}": g.clone() for n, g in engine.full("grads")}
    return found | {"norm": engine.step(LR)}


def train(engine: Engine, micro: int = ROWS) -> dict[str, torch.Tensor]:
    """All that two updates come to, the weights that a sampler would get among it."""
    found: dict[str, Any] = {f"initial {n}": w.clone() for n, w in engine.full("weights")}
    for seed in range(UPDATES):
        found |= {f"{seed} {name}": v for name, v in update(engine, seed, micro).items()}
    found |= {f"weight {n}": w.clone() for n, w in engine.full("weights")}
    found |= {f"served {n}": w.clone() for n, w in engine.weights()}
    for kind in engine.optimizer_states():
        found |= {f"{kind} {n}": t.clone() for n, t in engine.full(kind)}
    return {name: torch.as_tensor(v, dtype=torch.float64) for name, v in found.items()}


def train_native(
    model: Any, asked: Any, layout: str, micro: int = ROWS, **keys: Any
) -> dict[str, torch.Tensor]:
    """`train` of a native engine; for `RankPool.run`."""
    return train(native(model, asked, layout, **keys), micro)


def assert_alike(
    ranks: RankPool,
    model: Any,
    asked: Any,
    layout: str,
    micro: int = ROWS,
    *,
    both: Mapping[str, Any] | None = None,
    **keys: Any,
) -> None:
    """A layout comes to what the plain engine comes to; ``both``: keys that its config has, too."""
    wanted = train(plain(model, asked, **(both or {})))
    world, keys = world_of(layout), {**keys, **(both or {})}
    for found in ranks.run(train_native, model, asked, layout, micro, world=world, **keys):
        error, name = worst(found, wanted)
        assert error < 1e-9, (name, layout)


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest error over its tensor's norm, and whose it is."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    errors = {
        name: float((found[name] - value).norm() / value.norm().clamp_min(1e-3))
        for name, value in wanted.items()
    }
    name = max(errors, key=lambda n: errors[n])
    return errors[name], name
