"""Writes an adapter as PEFT does, so that `PeftModel.from_pretrained` takes it as its own."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from shardwise.adapters.peft import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    PeftAdapter,
    Place,
    Update,
    join,
    places,
    rules,
)
from shardwise.errors import CheckpointError
from shardwise.models import travel
from shardwise.models.common.config import DecoderConfig

BASE_HASH = "base_hash"  # in the header of the weights


def write(
    folder: Path | str, adapter: PeftAdapter, config: DecoderConfig, base: str = ""
) -> list[str]:
    """Write both files to a folder, which is made; returns their names.

    ``base``: path or name of the base model's Hugging Face folder, for PEFT to find it. Raises
    CheckpointError where PEFT has no form for it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw, tensors = to_peft(adapter, config, base)
    header = {"format": "pt"}
    if adapter.base_hash is not None:
        header[BASE_HASH] = adapter.base_hash
    (folder / WEIGHTS).write_bytes(_in_order(save(tensors, metadata=header)))
    (folder / CONFIG).write_bytes(travel.dump(raw))  # last: a folder that has it is complete
    return [CONFIG, WEIGHTS]


def _in_order(data: bytes) -> bytes:
    """The bytes of a safetensors file whose header has its keys in order: the same every time."""
    start = 8 + int.from_bytes(data[:8], "little")
    head = json.dumps(json.loads(data[8:start]), sort_keys=True, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + data[start:]


def to_peft(
    adapter: PeftAdapter, config: DecoderConfig, base: str = ""
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON of a config and the tensors, under PEFT's names."""
    known = list(places(config))
    found = {p: u for p in known if (u := join(p, adapter.updates, adapter.rslora)) is not None}
    unknown = set(adapter.updates) - {path for p in found for path in p.ours}
    if unknown or not found:
        raise CheckpointError(
            f"an adapter of {', '.join(sorted(unknown)) or 'nothing'}: no place in a Hugging Face "
            f"{config.family} model"
        )
    dora = {u.magnitude_O is not None for u in found.values()}
    tensors: dict[str, Tensor] = {}
    for place, update in found.items():
        if update.magnitude_O is not None and len(update.magnitude_O) != len(update.B_OR):
            raise CheckpointError(
                f"{place.name}: PEFT's DoRA has magnitudes of the whole module, and only a part of "
                f"{', '.join(place.ours)} is adapted; adapt all of them or none"
            )
        tensors |= _tensors(place, update)
    if len(dora) > 1:
        raise CheckpointError("an adapter with magnitudes for some modules: PEFT has all or none")
    saved = dict(_saved(adapter, config))
    tensors |= {f"{PREFIX}{name}": value for name, value in saved.items()}
    ranks = {p.name: u.rank for p, u in found.items()}
    alphas = {p.name: u.alpha for p, u in found.items()}
    rank, alpha = _most(ranks), _most(alphas)
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if config.head == "vocabulary" else "SEQ_CLS",
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": _number(alpha),
        "lora_dropout": adapter.raw.get("lora_dropout", 0.0),
        "target_modules": _targets(list(found), known),
        "rank_pattern": {_pattern(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(n): _number(a) for n, a in alphas.items() if a != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": dora == {True},
        "fan_in_fan_out": any(p.turned for p in found),
        "bias": "none",
        "modules_to_save": sorted({n.split(".")[-2] for n in saved}) or None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    for key, value in adapter.raw.items():  # what was read goes on, but for what we know
        raw.setdefault(key, value)
    return raw, tensors


def _tensors(place: Place, update: Update) -> Mapping[str, Tensor]:
    stem = PREFIX + place.name
    if place.embeds:
        names = ("lora_embedding_A", "lora_embedding_B")
    else:
        names = ("lora_A.weight", "lora_B.weight")
    found = dict(zip((f"{stem}.{n}" for n in names), (update.A_RI, update.B_OR), strict=True))
    if update.magnitude_O is not None:
        found[f"{stem}.lora_magnitude_vector"] = update.magnitude_O
    return {name: _alone(value) for name, value in found.items()}


def _saved(adapter: PeftAdapter, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    """What was trained whole, under Hugging Face's names."""
    named = {name: rule for rule in rules(config) for name in rule.ours}
    for name, value in adapter.saved.items():
        rule = named[name]
        if len(rule.ours) > 1 or not name.endswith(".weight"):
            raise CheckpointError(
                f"{name}: trained whole beside an adapter; of those, only whole modules without a "
                "bias are written in PEFT's form"
            )
        yield rule.hf, _alone(rule.join([value]))


def _alone(value: Tensor) -> Tensor:
    """In memory of its own: safetensors refuses what two names share."""
    return value.detach().to("cpu", copy=True).contiguous()


def _targets(found: list[Place], known: list[Place]) -> list[str]:
    """Last names where they mean these modules and no others, else whole ones."""
    names = {p.name for p in found}
    targets: set[str] = set()
    for name in names:
        last = name.rpartition(".")[2]
        alike = {p.name for p in known if p.name.rpartition(".")[2] == last}
        targets.add(last if alike <= names else name)
    return sorted(targets)


def _pattern(name: str) -> str:
    return re.escape(name)


def _most(values: Mapping[str, Any]) -> Any:
    """The most frequent value."""
    return Counter(values.values()).most_common(1)[0][0]


def _number(value: float) -> float | int:
    """As PEFT writes it: a whole number without a point."""
    return int(value) if float(value).is_integer() else value
