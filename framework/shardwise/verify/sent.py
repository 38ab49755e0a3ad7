"""What an engine sends to what serves rollouts must be what it holds now, to the bit.

Below fp64 no bound tells weights of an update ago, or rounded ones, from those of now; nor does one
in fp64 where an optimizer takes signs, of noise too.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from shardwise.adapters.registry import build_adapter
from shardwise.adapters.served import to_hf_tensors
from shardwise.engines.base import Engine
from shardwise.models.common.config import DecoderConfig
from shardwise.rollout.weights import digest


def checked(
    engine: Engine, model: DecoderConfig, problems: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """`Engine.weights`, compared with its masters, an adapter merged; a collective call."""
    config, named = engine.adapter_config, engine.full("weights")
    if config is not None and config.merges:
        named = build_adapter(config, model).merge(named)
    held = {name: digest(value) for name, value in to_hf_tensors(model, named)}
    for name, value in engine.weights():
        if held.pop(name, "") != digest(value):
            problems.append(f"{name}: what is sent is not what is held")
        yield name, value
    problems += [f"{name}: it is not sent" for name in held]
