"""An adapter's parameters as our engines have them, and as PEFT stores them.

PiSSA takes what it started from off again (``A0``, ``B0``); to PEFT that is an update of twice the
rank, ``[B, -B0] [A; A0]``, of the unchanged base, as its own conversion makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from shardwise.adapters.config import DoraConfig, LoraConfig, LowRankConfig
from shardwise.adapters.peft import PeftAdapter, Update
from shardwise.adapters.targets import MARK, is_adapter
from shardwise.errors import CheckpointError


def to_peft(
    own: Mapping[str, Tensor], config: LowRankConfig, base_hash: str | None = None
) -> PeftAdapter:
    """Of parameters by our names; those that are no adapter's (a new head) are saved whole."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in own.items():
        if is_adapter(name):
            path, _, part = name.rpartition(f".{MARK}.")
            parts.setdefault(path, {})[part] = value
    saved = {name: value for name, value in own.items() if not is_adapter(name)}
    updates = {path: _update(found, config.of(path)) for path, found in parts.items()}
    raw = {"lora_dropout": config.dropout}
    return PeftAdapter(updates, config.rslora, saved, raw=raw, base_hash=base_hash)


def _update(parts: Mapping[str, Tensor], config: LowRankConfig) -> Update:
    a, b, alpha = parts["A"], parts["B"], config.alpha
    if "A0" in parts:
        a, b = torch.cat([a, parts["A0"]]), torch.cat([b, -parts["B0"]], dim=1)
        alpha = config.scaling * (len(a) ** 0.5 if config.rslora else len(a))
    return Update(a, b, alpha, parts.get("magnitude"))


def to_own(adapter: PeftAdapter, where: str) -> tuple[LowRankConfig, dict[str, Tensor]]:
    """The config of an adapter of ours, and its parameters by our names.

    Raises CheckpointError, beginning with ``where``, for what a stage here would not train.
    """
    merge = "write the merged model instead (convert --merge-adapter)"
    if adapter.saved:
        raise CheckpointError(
            f"{where}: modules_to_save, bias: {', '.join(sorted(adapter.saved)[:3])} were trained "
            f"whole, and beside an adapter all stands still here; {merge}"
        )
    rank = Counter(u.rank for u in adapter.updates.values()).most_common(1)[0][0]
    alpha = Counter(u.alpha for u in adapter.updates.values()).most_common(1)[0][0]
    dora = any(u.magnitude_O is not None for u in adapter.updates.values())
    fields = {
        "kind": "dora" if dora else "lora",
        "rank": rank,
        "alpha": float(alpha),
        "rank_pattern": {p: u.rank for p, u in adapter.updates.items() if u.rank != rank},
        "alpha_pattern": {
            p: float(u.alpha) for p, u in adapter.updates.items() if u.alpha != alpha
        },
        "rslora": adapter.rslora,
        "targets": sorted(adapter.updates),
        "dropout": float(adapter.raw.get("lora_dropout") or 0.0),
    }
    config = (DoraConfig if dora else LoraConfig).model_validate(fields)
    own: dict[str, Tensor] = {}
    for path, update in adapter.updates.items():
        own[f"{path}.{MARK}.A"], own[f"{path}.{MARK}.B"] = update.A_RI, update.B_OR
        if update.magnitude_O is not None:
            own[f"{path}.{MARK}.magnitude"] = update.magnitude_O
    return config, own
