"""Which layers of the plain engine are quantised, cut as the ranks of a layout would cut them.

A rank scales what it holds: its tokens, its columns or rows of a weight. Here each product is cut
into those parts, each part is quantised by itself, and the parts are put together.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.config.schema import Fp8Config
from shardwise.engines.base import Scaled
from shardwise.engines.plain_fp8 import Layer, Product, Recipe, Sums, worst
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.sharding import style_of
from shardwise.parallel.layout import Layout, parse_layout, world_of

# Shape suffixes: B sequences, T tokens, t tokens of a context rank, I input and O output features.


class PlainFp8:
    """The quantised layers of a model, and the sentinel that looks at them."""

    def __init__(
        self, config: Fp8Config, domains: str | None, model: Decoder, device: torch.device
    ) -> None:
        """``domains``: the layout whose ranks scale; None: one rank."""
        self.config = config
        self.layout = Layout() if domains is None else parse_layout(domains, world_of(domains))
        self.listeners: list[Callable[[Scaled], None]] = []
        recipe = Recipe(config)
        self.layers: dict[str, Layer] = {}
        assert isinstance(model.config, DecoderConfig)
        self.kv_heads = model.config.kv_heads
        table = registry.sharding(model.config)
        for path, module in _linears(model, config):
            self.layers[path] = Layer(path, recipe, device)
            style = style_of(table, f"{path}.weight")
            vars(module)["forward"] = self._forward(self.layers[path], module, style)
        self.fallen: dict[str, int] = {}  # layer: the update from which on it is not quantised
        self.seen: dict[str, list[float]] = {}  # amaxes of each layer's last look
        self.looked: list[str] = []
        self.events = [("fp8", "engine.fp8 is computed from the papers")]

    @property
    def multiple(self) -> int:
        """What the layout's ranks fill the tokens of a micro-batch up to."""
        layout = self.layout
        chunks = 1 if layout.cp == 1 else layout.cp * (2 if layout.cp_kind == "ring" else 1)
        return math.lcm(chunks, layout.cp * (layout.tp if layout.sp else 1))

    # --- products -------------------------------------------------------------------------------

    def _forward(
        self, layer: Layer, module: nn.Linear, style: str | None
    ) -> Callable[[Tensor], Tensor]:
        def forward(x_BTI: Tensor) -> Tensor:
            weight_OI: Tensor = module.weight
            bias_O: Tensor | None = module.bias
            if self.layout.tp > self.kv_heads and style == "kv":
                heads = [r * self.kv_heads // self.layout.tp for r in range(self.layout.tp)]
                width = weight_OI.shape[0] // self.kv_heads
                rows = torch.cat([torch.arange(h * width, (h + 1) * width) for h in heads])
                # Each rank's copy of its head serves query heads of its own.
                weight_OI = weight_OI[rows.to(weight_OI.device)]
                bias_O = None if bias_O is None else bias_O[rows.to(bias_O.device)]
            if layer.active:
                out = self._over_tokens(layer, x_BTI, weight_OI, style)
            else:
                out = x_BTI @ weight_OI.T
            return out if bias_O is None else out + bias_O

        return forward

    def _over_tokens(
        self, layer: Layer, x_BTI: Tensor, weight_OI: Tensor, style: str | None
    ) -> Tensor:
        """Each context rank's tokens by themselves."""
        cp, num_tokens = self.layout.cp, x_BTI.shape[1]
        chunks = torch.arange(num_tokens).view(cp, -1)
        if cp > 1 and self.layout.cp_kind == "ring":  # a chunk from either end
            halves = torch.arange(num_tokens).view(2 * cp, -1)
            chunks = torch.stack([torch.cat([halves[r], halves[-1 - r]]) for r in range(cp)])
        parts = [
            self._over_features(layer, x_BTI[:, index_t], weight_OI, style, rank)
            for rank, index_t in enumerate(chunks)
        ]
        return torch.cat(parts, dim=1)[:, chunks.flatten().argsort()]

    def _over_features(
        self, layer: Layer, x_BtI: Tensor, weight_OI: Tensor, style: str | None, rank: int
    ) -> Tensor:
        """Each tensor rank's features by themselves."""
        tp = self.layout.tp
        first = rank * tp

        def multiply(part: int, x_BtI: Tensor, weight_OI: Tensor) -> Tensor:
            def tell(amax_3: Tensor, inverses: Mapping[str, Tensor]) -> None:
                for listener in self.listeners:
                    listener(Scaled(layer.path, first + part, amax_3, inverses))

            out: Tensor = Product.apply(x_BtI.flatten(0, 1), weight_OI, layer, tell)
            return out.view(*x_BtI.shape[:2], -1)

        if style == "row":
            cut = zip(x_BtI.chunk(tp, dim=-1), weight_OI.chunk(tp, dim=1), strict=True)
            return torch.stack([multiply(p, x, w) for p, (x, w) in enumerate(cut)]).sum(0)
        weights = weight_OI.chunk(tp) if style in ("column", "kv") else [weight_OI]
        return torch.cat([multiply(p, x_BtI, w) for p, w in enumerate(weights)], dim=-1)

    @contextlib.contextmanager
    def listening(self, listener: Callable[[Scaled], None]) -> Iterator[None]:
        """Tell ``listener`` of every layer's backward pass inside."""
        self.listeners.append(listener)
        try:
            yield
        finally:
            self.listeners.remove(listener)

    # --- the update -----------------------------------------------------------------------------

    def begin_update(self, update: int) -> None:
        """Choose the layers to look at, if it is time: some of those that still are quantised."""
        config, there = self.config.sentinel, [p for p in self.layers if p not in self.fallen]
        looks, rest = divmod(update + 1, config.every)
        self.looked = []
        if config.enabled and there and not rest:
            count = min(config.layers or len(there), len(there))
            turn = {there[((looks - 1) * count + i) % len(there)] for i in range(count)}
            self.looked = [p for p in there if p in turn]
        for path, layer in self.layers.items():
            layer.sums = Sums() if path in self.looked else None

    def end_update(self, update: int) -> dict[str, float]:
        """The sentinel's metrics; layers beyond a limit fall, histories move on."""
        limits = self.config.sentinel
        found: dict[str, float] = {}
        for path in self.looked:
            layer = self.layers[path]
            assert layer.sums is not None
            ratios = layer.sums.ratios()
            now, before = layer.amax_3.tolist(), self.seen.get(path, [])
            pairs = zip(now, before, strict=False)
            drifts = [math.log2(a / b) for a, b in pairs if 0 < a < math.inf and b > 0]
            self.seen[path] = [v if math.isfinite(v) else 0.0 for v in now]
            top = {name: getattr(limits, f"max_{name}") for name in ratios}
            if limits.fallback and any(not v <= top[name] for name, v in ratios.items()):
                self.fallen[path] = update + 1
                self.events.append(("fp8_fallback", f"{path} computes unquantised from now on"))
            if drifts:
                ratios["drift"] = worst(drifts)
            found |= {f"fp8.{path}.{name}": value for name, value in ratios.items()}
        for name in ("error", "underflow", "overflow", "drift"):
            values = [v for key, v in found.items() if key.endswith(f".{name}")]
            if values:
                found[f"fp8_{name}"] = worst(values)
        if self.looked:
            found["fp8_fallbacks"] = float(len(self.fallen))
        for path, layer in self.layers.items():
            layer.end_update()
            layer.active = path not in self.fallen
        return found

    # --- state ----------------------------------------------------------------------------------

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Of delayed scaling: amax histories and scales, live, under every engine's names."""
        if self.config.recipe == "delayed":
            for path, layer in self.layers.items():
                yield f"fp8.{path}.amax_history", layer.history_H3
                yield f"fp8.{path}.scale", layer.scale_3

    def state_dict(self) -> dict[str, Any]:
        """What the sentinel knows, as JSON."""
        return {"sentinel": {"fallen": self.fallen, "amax": self.seen}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict`; `tensors` were filled in place before."""
        self.fallen = {str(p): int(n) for p, n in state["sentinel"]["fallen"].items()}
        self.seen = {p: list(map(float, v)) for p, v in state["sentinel"]["amax"].items()}
        for path, layer in self.layers.items():
            layer.active = path not in self.fallen


def _linears(model: Decoder, config: Fp8Config) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of blocks that the config names."""
    last = len(model.layers) - config.last_layers
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or not path.startswith("layers."):
            continue
        inside = config.first_layers <= int(path.split(".")[1]) < last
        if inside and any(fnmatch.fnmatchcase(path, pattern) for pattern in config.modules):
            yield path, module
