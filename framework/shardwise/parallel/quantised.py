"""Which linear layers FP8 is for, and how wide a rank's part of each is: pure facts of a config."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import torch
from torch import nn

from shardwise.config.schema import Fp8Config
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.sharding import ShardRule, Style


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A linear layer that computes in FP8, and how tensor parallelism cuts it."""

    path: str
    out_features: int
    in_features: int
    style: Style | None

    def local(self, tp: int, kv_heads: int) -> tuple[float, float]:
        """Output and input features of one rank's product; not whole if tp does not divide."""
        if self.style == "row":
            return self.out_features, self.in_features / tp
        parts = min(tp, kv_heads) if self.style == "kv" else tp
        cut = self.style in ("column", "kv")
        return self.out_features / parts if cut else self.out_features, self.in_features


def quantised_linears(config: DecoderConfig, fp8: Fp8Config) -> list[Quantised]:
    """In the model's order; see `Fp8Config.modules`, ``first_layers`` and ``last_layers``."""
    sizes = config.model_copy(update={"vocab_size": config.vocab_size or 1})
    with torch.device("meta"):
        model = registry.build(sizes)
    table = registry.sharding(config)
    kept = range(fp8.first_layers, config.num_layers - fp8.last_layers)
    found = []
    for path, module in model.named_modules():
        head, _, rest = path.partition(".")
        if not isinstance(module, nn.Linear) or head != "layers":
            continue
        if int(rest.partition(".")[0]) in kept and _matches(path, fp8.modules):
            style = _style(table, path)
            found.append(Quantised(path, module.out_features, module.in_features, style))
    return found


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def _style(table: Sequence[ShardRule], path: str) -> Style | None:
    return next((r.style for r in table if fnmatch.fnmatchcase(path, r.modules)), None)
