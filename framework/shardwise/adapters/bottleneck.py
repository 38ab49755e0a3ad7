"""Bottleneck adapters: ``s (up act(down x + b) + c)``, added to what a block computes.

- sequential (Houlsby et al. 2019, section 2.1): of what attention gives, and of what the MLP gives,
  before dropout and the residual stream.
- parallel (He et al. 2022, section 3.3): of what the MLP is given, beside it.

Under tensor parallelism neither adds a collective to a block. What attention and MLP give is whole
on every rank (or a rank's own tokens), so a sequential adapter is whole too, and each rank computes
all of it: cut, its result would have to be summed once more. With sequence parallelism each rank
has its tokens' part of the gradients, which are summed behind the backward pass with those of
norms. A parallel one is cut as the MLP is, down by its outputs and up by its inputs, and its
partial result leaves with the MLP's in the same sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Replicate, Shard

from shardwise import memory
from shardwise.adapters.config import BottleneckConfig
from shardwise.adapters.targets import MARK, stand_still
from shardwise.config.adapters import AdapterConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.init import InitSpec, init_tensor
from shardwise.parallel import tensor
from shardwise.parallel.tensor import local

# Shape suffixes: B sequences, T tokens, D model width, M features of the bottleneck.

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
_WHOLE = Replicate()
# How the parameters lie on tp ranks. Those that see a rank's tokens alone, with sequence
# parallelism, are partial.
_CUTS: dict[str, tuple[dict[str, Placement], tuple[str, ...]]] = {
    "sequential": (
        dict.fromkeys(("down", "down_bias", "up", "up_bias"), _WHOLE),
        ("down", "down_bias", "up", "up_bias"),
    ),
    "parallel": (
        {"down": Shard(0), "down_bias": Shard(0), "up": Shard(1), "up_bias": _WHOLE},
        ("up_bias",),
    ),
}
# The linear layer behind which what a part of a block computes is whole.
_LAST = {"attn": "o", "mlp": "down"}


def _shapes(config: BottleneckConfig, width: int) -> dict[str, tuple[int, ...]]:
    size = config.size
    return {"down": (size, width), "down_bias": (size,), "up": (width, size), "up_bias": (width,)}


class Bottleneck(nn.Module):
    """The parameters, and the two products over local parts."""

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, config: BottleneckConfig, host: nn.Module) -> None:
        super().__init__()
        self.scaling, self.activation = config.scaling, ACTIVATIONS[config.activation]
        weight: Any = host.weight
        axis: tensor.Axis | None = getattr(host, "axis", None)
        placements, partial = _CUTS[config.placement]
        self.partial = partial if axis is not None and axis.sequence else ()
        for name, shape in _shapes(config, weight.shape[0]).items():
            old = nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device))
            setattr(self, name, old if axis is None else axis.parameter(old, placements[name]))
        self.given_BTD: Tensor | None = None  # what the MLP around is given, while it computes

    def product(self, x_BTD: Tensor) -> Tensor:
        """``s up act(down x + b)``, or this rank's part of it."""
        hidden_BTM = self.activation(F.linear(x_BTD, local(self.down), local(self.down_bias)))
        return self.scaling * F.linear(hidden_BTM, local(self.up))

    def bias(self) -> Tensor:
        """``s c``, which is added once."""
        return self.scaling * local(self.up_bias)

    def beside(self, x: Tensor, out_BTD: Tensor, weight: Tensor, rows: slice) -> Tensor:
        """See `tensor.Swapped.adapter`: of the MLP's last layer."""
        assert self.given_BTD is not None
        return out_BTD + self.product(self.given_BTD)


class BottleneckAdapter:
    """See `adapters.base.Adapter`."""

    has_dropout = False

    def __init__(self, config: AdapterConfig, model: DecoderConfig) -> None:
        assert isinstance(config, BottleneckConfig)
        if config.size > model.hidden_size:
            raise ConfigError(
                f"adapter.size: {config.size} is no bottleneck in a model of width "
                f"{model.hidden_size}; give at most that"
            )
        self.config, self.model = config, model
        self.parts = ("attn", "mlp") if config.placement == "sequential" else ("mlp",)

    def shape(self) -> memory.Adapted:
        """See `Adapter`."""
        return memory.Adapted(
            bottleneck=self.config.size,
            per_block=len(self.parts),
            cut=self.config.placement == "parallel",
            quantised=self.config.quantise,
        )

    def attach(self, model: Decoder) -> list[str]:
        """See `Adapter`."""
        stand_still(model)
        partial: list[str] = []
        for i, block in enumerate(model.layers):
            for part in self.parts if block is not None else ():
                path = f"layers.{i}.{part}"
                partial += [f"{path}.{MARK}.{name}" for name in self._attach(model, path, part)]
        return partial

    def _attach(self, model: Decoder, path: str, part: str) -> tuple[str, ...]:
        last = f"{path}.{_LAST[part]}"
        try:
            module = model.get_submodule(path)
            host: nn.Module = model.get_submodule(last)
        except AttributeError:
            raise ConfigError(
                f"adapter.kind: bottleneck stands behind {last}, and this {type(model).__name__} "
                "has none; take lora"
            ) from None
        axis: tensor.Axis | None = getattr(host, "axis", None)
        size, parallel = self.config.size, self.config.placement == "parallel"
        if parallel and axis is not None and -(-size // -(-size // axis.size)) < axis.size:
            raise ConfigError(
                f"adapter.size: {size} features leave a rank of tp{axis.size} none; give a "
                f"multiple of {axis.size}"
            )
        adapter = Bottleneck(self.config, host)
        module.adapter = adapter
        if parallel:
            tensor.swapped_linear(model, last).adapter = adapter.beside
            module.forward = functools.partial(_parallel, adapter, module.forward)
        else:
            module.forward = functools.partial(_sequential, adapter, module.forward)
        return adapter.partial

    def start(
        self, seed: int, names: Collection[str], weight_of: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Both products' weights normal, of a small deviation; biases zero."""
        spec = InitSpec("normal", self.config.init_std)
        for i in range(self.model.num_layers):
            for part in self.parts:
                for name, shape in _shapes(self.config, self.model.hidden_size).items():
                    full = f"layers.{i}.{part}.{MARK}.{name}"
                    if full in names:
                        zero = name.endswith("bias")
                        value = torch.zeros(shape) if zero else init_tensor(full, shape, spec, seed)
                        yield full, value

    def merge(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Raises ConfigError: between its products is a function that no weights hold."""
        raise ConfigError("adapter.kind: bottleneck is no change of weights and cannot be merged")


def _sequential(
    adapter: Bottleneck, forward: Callable[..., Tensor], x_BTD: Tensor, *args: Any
) -> Tensor:
    out_BTD = forward(x_BTD, *args)
    return out_BTD + adapter.product(out_BTD) + adapter.bias()


def _parallel(adapter: Bottleneck, forward: Callable[..., Tensor], x_BTD: Tensor) -> Tensor:
    adapter.given_BTD = x_BTD
    out_BTD = forward(x_BTD)
    adapter.given_BTD = None
    return out_BTD + adapter.bias()
