"""``engine.kind: megatron``: NVIDIA's Megatron-core behind the contract of `engines.base`.

Megatron computes: its `GPTModel`, its tensor and sequence parallelism, its pipeline schedules, its
data parallelism over fp32 gradient buffers, its sums over tensor and pipeline ranks, and its
optimizer. Ours is what surrounds it: the initial weights, the loss contract, the attention core
(`model`), which sees packed rows and rotates by their positions; and, where the recipe asks for
what its optimizer cannot, or for ours, masters (`engines.native`'s, in our names and our cuts),
clipping and the update rule.

- `config`: the keys of this kind.
- `refusals`: one table of what it cannot compute rightly.
- `model`: a `GPTModel` from our model configs.
- `names`: where the parameters of ours lie in those of Megatron.
- `engine`: the contract, with our masters.
- `optimizer`: Megatron's own optimizer, read and written by our names.
- `core_engine`: the contract with it; `choose`: which of the two.
- `cpu`: a shim that lets it run without a GPU, for proof and not for speed.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

from shardwise.errors import ConfigError

if TYPE_CHECKING:
    from shardwise.engines.base import Engine, Setup


def build(setup: Setup) -> Engine | None:
    """See `engines.registry.register_engine`."""
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        raise ConfigError(
            "engine.kind: megatron needs megatron-core, which is not installed; "
            "pip install 'shardwise[megatron]', or write kind: native"
        )
    with warnings.catch_warnings():
        # Of fused kernels that are not installed, and of its own old names.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        from shardwise.engines.megatron.choose import build_engine

        return build_engine(setup)
