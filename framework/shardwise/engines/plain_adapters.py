"""Adapters and frozen parameters as the papers have them. The oracle's own.

- LoRA: ``h = W x + (alpha / r) B A x``, B zero at the start (Hu et al. 2021, section 4.1); rsLoRA
  divides by the root of r (Kalajdzievski 2023, section 3); LoRA+ gives B a rate of its own (Hayou
  et al. 2024).
- PiSSA: A and B from the largest singular values of W, and the residual in W's place (Meng et al.
  2024, equations 2 to 4).
- DoRA: ``m (W + B A) / |W + B A|``, the norm of each output's weights a constant in the backward
  pass (Liu et al. 2024, equations 5 and 11).
- Bottleneck adapters: ``h + s (W_up f(W_down h + b) + c)`` of what attention and the MLP give
  (Houlsby et al. 2019, figure 2), or of the MLP's input, added to its output (He et al. 2022,
  table 1: "scaled parallel adapter"); both weights normal, close to zero, and biases zero.

The native engine never imports this, nor this what it adapts with.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.adapters.config import BottleneckConfig, LowRankConfig
from shardwise.config.adapters import AdapterConfig, FreezeConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.init import InitSpec, init_tensor
from shardwise.ops import rng
from shardwise.ops.dropout import dropout

# Shape suffixes: B sequences, T tokens, I input and O output features.


def plain_adapter(config: AdapterConfig, model: Decoder) -> PlainLowRank | PlainBottleneck:
    """The adapter of a kind on a model, which stands still from then on, but for a scalar head."""
    model.requires_grad_(False)
    model.head.requires_grad_(model.config.head == "scalar")
    if isinstance(config, BottleneckConfig):
        return PlainBottleneck(config, model)
    assert isinstance(config, LowRankConfig)
    return PlainLowRank(config, model)


class PlainLowRank:
    """LoRA or DoRA on a model of plain modules, as hooks behind them."""

    def __init__(self, config: LowRankConfig, model: Decoder) -> None:
        self.config = config
        self.keys: dict[str, Tensor | None] = {}  # of the block that computes, and of the head
        self.adapted: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            if any(self._names(path, pattern) for pattern in config.targets):
                self.adapted[path] = module
        self.has_dropout = config.dropout > 0
        for path, module in self.adapted.items():
            module.add_module("adapter", self._parts(module, path))
            module.register_forward_hook(self._hook(path, isinstance(module, nn.Embedding)))
        for i, block in enumerate(model.layers):
            block.register_forward_pre_hook(self._remember(f"layers.{i}."))
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.keys.update({"": kwargs.get("rng_keys_BT")}),
            with_kwargs=True,
        )

    def _names(self, path: str, pattern: str) -> bool:
        linear = ("q", "k", "v", "o", "gate", "up", "down")
        last = path.split(".")[-1]
        if pattern == "all-linear":
            return last in linear
        known = last in (*linear, "head", "embed", "pos_embed")
        return known and (last == pattern or fnmatch.fnmatchcase(path, pattern))

    def _parts(self, module: Any, path: str) -> nn.Module:
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.Embedding):
            inputs, outputs = outputs, inputs
        r, found = self.config.of(path).rank, nn.Module()
        shapes = {"A": (r, inputs), "B": (outputs, r)}
        if self.config.init == "pissa":
            shapes |= {"A0": (r, inputs), "B0": (outputs, r)}
        for name, shape in shapes.items():
            value = nn.Parameter(module.weight.new_zeros(shape), name in "AB")
            found.register_parameter(name, value)
        if self.config.kind == "dora":
            found.register_parameter("magnitude", nn.Parameter(module.weight.new_ones(outputs)))
        return found

    def _remember(self, block: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.keys[block] = args[1].rng_keys_BT

        return hook

    def _hook(self, path: str, embeds: bool) -> Callable[..., Tensor]:
        block = ".".join(path.split(".")[:2]) + "." if path.startswith("layers.") else ""
        salt = rng.key(0, "adapter", path) % 2**31
        scale = self.scale_of(path)

        def embedding(module: Any, args: Any, output: Tensor) -> Tensor:
            own = module.adapter
            return output + scale * (own.A.T[args[0]] @ own.B.T)  # type: ignore[no-any-return]

        def linear(module: Any, args: Any, output: Tensor) -> Tensor:
            own, x = module.adapter, args[0]
            noisy = dropout(x, self.config.dropout, self.keys.get(block), salt)
            update = noisy @ own.A.T @ own.B.T
            if self.config.init == "pissa":
                update = update - x @ own.A0.T @ own.B0.T
            bias = 0.0 if module.bias is None else module.bias
            raw = output - bias + (scale * update).to(output.dtype)
            if self.config.kind == "dora":
                norm_O = self._adapted(module, path).detach().norm(dim=1)
                raw = raw * (own.magnitude.to(norm_O.dtype) / norm_O).to(raw.dtype)
            return raw + bias  # type: ignore[no-any-return]

        return embedding if embeds else linear

    def scale_of(self, path: str) -> float:
        """What B A is multiplied by."""
        own = self.config.of(path)
        return own.alpha / (math.sqrt(own.rank) if own.rslora else own.rank)

    def _adapted(self, module: Any, path: str) -> Tensor:
        """``W + s B A``, in fp32 at least."""
        own = module.adapter
        wide = torch.float64 if module.weight.dtype == torch.float64 else torch.float32
        update = own.B.to(wide) @ own.A.to(wide)
        if self.config.init == "pissa":
            update = update - own.B0.to(wide) @ own.A0.to(wide)
        if isinstance(module, nn.Embedding):
            update = update.T
        result: Tensor = module.weight.to(wide) + self.scale_of(path) * update
        return result

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Initial values, from the weights of now."""
        for path, module in self.adapted.items():
            own: Any = module.adapter
            weight: Any = module.weight
            scale = self.scale_of(path)
            r, inputs = own.A.shape
            outputs = len(own.B)

            def normal(name: str, *shape: int, std: float, at: str = path) -> Tensor:
                return init_tensor(f"{at}.adapter.{name}", shape, InitSpec("normal", std), seed)

            if isinstance(module, nn.Embedding):
                own.B.copy_(normal("B", outputs, r, std=1.0))
            elif self.config.init == "pissa":
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
                for i in range(r):  # of two signs, the one that makes the largest of u positive
                    sign = torch.sign(u[u[:, i].abs().argmax(), i])
                    own.A[i] = (s[i] / scale).sqrt() * (sign * vh[i])
                    own.B[:, i] = u[:, i] * sign * (s[i] / scale).sqrt()
                own.A0.copy_(own.A)
                own.B0.copy_(own.B)
            elif self.config.init == "orthogonal":
                q = torch.linalg.qr(normal("basis", r, r, std=1.0).double())[0].float()
                own.A.copy_(q[0::2].T @ normal("A", r // 2, inputs, std=0.1))
                own.B.copy_(normal("B", outputs, r // 2, std=0.1) @ q[1::2])
            else:
                own.A.copy_(normal("A", r, inputs, std=1 / math.sqrt(3 * inputs)))
                own.B.zero_()
            if self.config.kind == "dora":
                own.magnitude.copy_(weight.norm(dim=1))

    @torch.no_grad()
    def merged(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The parameters of a plain model that computes the same."""
        for name, value in named:
            path, _, last = name.rpartition(".")
            if ".adapter." in name:
                continue
            if path in self.adapted and last == "weight":
                module: Any = self.adapted[path]
                result = self._adapted(module, path)
                if self.config.kind == "dora":
                    magnitude = module.adapter.magnitude.to(result.dtype)[:, None]
                    result = magnitude / result.norm(dim=1, keepdim=True) * result
                value = result.to(value.dtype)
            yield name, value


class PlainBottleneck:
    """Small networks in every block, as hooks behind attention and MLP."""

    has_dropout = False

    def __init__(self, config: BottleneckConfig, model: Decoder) -> None:
        self.config, width = config, model.config.hidden_size
        self.scale = config.scale or {"sequential": 1.0, "parallel": 4.0}[config.placement]
        self.own: dict[str, nn.Module] = {}
        for i, block in enumerate(model.layers):
            hosts: dict[str, Any] = {f"layers.{i}.mlp": block.mlp}
            if config.placement == "sequential":
                hosts[f"layers.{i}.attn"] = block.attn
            for path, module in hosts.items():
                self.own[f"{path}.adapter"] = own = nn.Module()
                weight = module.down.weight if path.endswith("mlp") else module.o.weight
                shapes = {
                    "down": (config.size, width),
                    "down_bias": (config.size,),
                    "up": (width, config.size),
                    "up_bias": (width,),
                }
                for name, shape in shapes.items():
                    own.register_parameter(name, nn.Parameter(weight.new_zeros(shape)))
                module.add_module("adapter", own)
                module.register_forward_hook(self._added)

    def _added(self, module: Any, args: Any, output: Tensor) -> Tensor:
        own = module.adapter
        x = output if self.config.placement == "sequential" else args[0]
        hidden = x @ own.down.T + own.down_bias
        if self.config.activation == "relu":
            hidden = hidden.clamp(min=0)
        else:
            hidden = torch.nn.functional.gelu(hidden)
        return output + self.scale * (hidden @ own.up.T + own.up_bias)  # type: ignore[no-any-return]

    @torch.no_grad()
    def start(self, seed: int) -> None:
        """Weights close to zero, and no biases."""
        for path, own in self.own.items():
            for name, value in own.named_parameters():
                value.zero_()
                if value.dim() == 2:
                    spec = InitSpec("normal", self.config.init_std)
                    value.copy_(init_tensor(f"{path}.{name}", tuple(value.shape), spec, seed))

    def merged(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """No plain model computes the same."""
        raise NotImplementedError


def freeze(model: Decoder, config: FreezeConfig) -> None:
    """Make what the patterns name stand still, and what is in front of the last layers."""
    for name, parameter in model.named_parameters():
        frozen = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.patterns)
        if config.train_last is not None:
            parts = name.split(".")
            if parts[0] == "layers":
                frozen |= int(parts[1]) < len(model.layers) - config.train_last
            else:
                frozen |= parts[0] not in ("norm", "head")
        parameter.requires_grad_(not frozen)
