"""Reads an adapter that PEFT stored, bit by bit, or refuses it with key, file and mend.

What PEFT would load with a warning or none, and then compute something else with, is refused: no
``target_modules``, a tensor under another prefix, a module that ``target_modules`` does not name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwise import safe_files
from shardwise.adapters.peft import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    PeftAdapter,
    Place,
    Update,
    places,
    split,
)
from shardwise.adapters.peft import rules as rules_of
from shardwise.adapters.peft_write import BASE_HASH
from shardwise.errors import CheckpointError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.config_file import read_json

PICKLED = "adapter_model.bin"
ALL_LINEAR = "all-linear"
_MAX_PATTERN = 256  # characters; theirs are regular expressions, which a file should not grow
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Keys by which PEFT computes otherwise than ``W + s B A``, the values that say nothing, the mend.
_MERGE = "merge it with peft (merge_and_unload) and give the merged model"
_FOREIGN: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), _MERGE),
    "bias": ((None, "none", "all", "lora_only"), _MERGE),
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "lora_bias", "velora_config", "kasa_config", "arrow_config",
         "monteclora_config", "alora_invocation_tokens", "layer_replication", "target_parameters",
         "trainable_token_indices", "ensure_weight_tying"),
        ((None, False, [], {}), _MERGE),
    ),
    # These change the base's weights when the adapter starts, and the file does not hold them.
    "init_lora_weights": (
        (None, True, False, "gaussian", "orthogonal", "eva"),
        "save it again with path_initial_model_for_weight_conversion, which makes it an adapter of "
        "the base model itself",
    ),
}  # fmt: skip
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


def is_adapter_folder(folder: Path | str) -> bool:
    """Whether a folder says that it holds an adapter of PEFT's."""
    return (Path(folder) / CONFIG).exists()


def read(folder: Path | str, config: DecoderConfig) -> PeftAdapter:
    """The adapter in a folder, for a model of this config. Raises CheckpointError."""
    folder = Path(folder)
    raw = read_json(folder / CONFIG)
    _check_config(raw, folder / CONFIG)
    tensors, header = _tensors(folder)
    return _Reader(folder, raw, config).adapter(tensors, header.get(BASE_HASH))


def check_base(adapter: PeftAdapter, folder: Path | str, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if copies of the base's weights are not those of ``weights`` (ours)."""
    for name, copy in adapter.base.items():
        own = weights.get(name)
        if own is not None and not torch.equal(own.to(copy.dtype), copy):
            raise CheckpointError(
                f"{Path(folder) / WEIGHTS}: its copy of the base model's {name} differs from this "
                f"base's: it was trained on another base model "
                f"({adapter.raw.get('base_model_name_or_path')!r}); give that one"
            )


def _check_config(raw: Mapping[str, Any], path: Path) -> None:
    for key, (neutral, mend) in _FOREIGN.items():
        value = raw.get(key)
        if value not in neutral:
            raise CheckpointError(
                f"{path}: {key} = {value!r} means a computation that is not done here; {mend}"
            )
    if not raw.get("target_modules"):
        raise CheckpointError(
            f"{path}: no target_modules, without which PEFT puts the adapter wherever its own "
            "table says; name the modules that the adapter was trained for"
        )
    for key in ("r", "lora_alpha"):
        value = raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(f"{path}: {key} is {value!r}; allowed: a number above 0")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = raw.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {key} must be an object of patterns and numbers")
        for pattern, value in patterns.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise CheckpointError(f"{path}: {key}: {pattern!r} is {value!r}, not above 0")
            if len(pattern) > _MAX_PATTERN or re.search(r"[(+{]|\*.*\*.*\*", pattern):
                raise CheckpointError(
                    f"{path}: {key}: {pattern!r} is a pattern that is not read here; write names "
                    "of modules"
                )


def _tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of the weight file, and its header."""
    path = folder / WEIGHTS
    if not path.exists():
        pickled = (folder / PICKLED).exists()
        raise CheckpointError(
            f"{path} does not exist"
            + (
                f"; {PICKLED} does, and pickled weights are not loaded: load it with peft and "
                "save_pretrained it again"
                if pickled
                else "; an adapter is that file and adapter_config.json"
            )
        )
    try:
        safe_files.open_regular(path).close()  # a FIFO would be waited for
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return found, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


class _Reader:
    """One folder's tensors, sorted to the modules that they belong to."""

    def __init__(self, folder: Path, raw: dict[str, Any], config: DecoderConfig) -> None:
        self.file, self.raw, self.config = folder / WEIGHTS, raw, config
        self.config_file = folder / CONFIG
        self.places = {p.name: p for p in places(config)}
        self.rules = {rule.hf: rule for rule in rules_of(config)}
        self.shapes = config.spec.shapes()

    def adapter(self, tensors: Mapping[str, Tensor], base_hash: str | None) -> PeftAdapter:
        """Every tensor is used, or named in an error."""
        parts: dict[str, dict[str, Tensor]] = {}
        saved: dict[str, Tensor] = {}
        base: dict[str, Tensor] = {}
        for key, value in tensors.items():
            if value.dtype not in _DTYPES:
                raise CheckpointError(f"{self.file}: {key} is stored as {value.dtype}, not floats")
            name = self._without_prefix(key)
            module, part = self._part_of(name)
            if part is not None:
                parts.setdefault(module, {})[part] = value
                continue
            into = base if ".base_layer." in name and name.endswith(".weight") else saved
            rule = self.rules.get(name.replace(".base_layer.", "."))
            if rule is None:
                raise CheckpointError(f"{self.file}: {key}: no such parameter in this model")
            into |= dict(rule.split(value))
        updates: dict[str, Update] = {}
        for module, own in parts.items():
            place = self._place(module)
            updates |= dict(split(place, self._update(place, own)))
        if not updates:
            raise CheckpointError(f"{self.file}: holds no update of any module")
        self._refuse_tied(updates)
        self._check_saved([*saved.items(), *base.items()])
        rslora = bool(self.raw.get("use_rslora"))
        return PeftAdapter(updates, rslora, saved, base, self.raw, base_hash)

    def _without_prefix(self, key: str) -> str:
        if not key.startswith(PREFIX):
            raise CheckpointError(
                f"{self.file}: {key} does not begin with {PREFIX}, and PEFT would leave it out "
                "with a warning; save the adapter with PeftModel.save_pretrained"
            )
        return key.removeprefix(PREFIX)

    def _part_of(self, name: str) -> tuple[str, str | None]:
        """The module of theirs and the part of its update that a tensor is; no part: another."""
        for ending, part in _PARTS.items():
            if name.endswith(f".{ending}"):
                return name.removesuffix(f".{ending}"), part
        return name, None

    def _place(self, module: str) -> Place:
        place = self.places.get(module)
        if place is None:
            raise CheckpointError(
                f"{self.file}: {module} is no linear layer and no embedding of this "
                f"{self.config.family} model; is the adapter another base model's "
                f"({self.raw.get('base_model_name_or_path')!r})?"
            )
        targets = self.raw["target_modules"]
        if isinstance(targets, list):
            named = any(module == t or module.endswith(f".{t}") for t in targets)
        else:
            # Another text is a regular expression: their tensors say what it meant.
            named = targets != ALL_LINEAR or module.rpartition(".")[2] not in ("lm_head", "score")
            named = named and not (targets == ALL_LINEAR and place.embeds)
        if not named:
            raise CheckpointError(
                f"{self.config_file}: target_modules {targets} do not name {module}, of which "
                f"{self.file.name} holds an update, so PEFT would leave it out; add it"
            )
        return place

    def _update(self, place: Place, parts: Mapping[str, Tensor]) -> Update:
        """Raises CheckpointError for what is missing or of another shape."""
        wanted = {"A", "B"} | ({"magnitude"} if self.raw.get("use_dora") else set())
        if parts.keys() != wanted:
            raise CheckpointError(
                f"{self.file}: {place.name} has {', '.join(sorted(parts))} of "
                f"{', '.join(sorted(wanted))}; does {CONFIG} belong to it (use_dora)?"
            )
        if place.embeds and "magnitude" in wanted:
            raise CheckpointError(
                f"{self.config_file}: use_dora on the embedding {place.name} is not computed here; "
                f"{_MERGE}"
            )
        rank = self._number("r", "rank_pattern", place.name)
        rows, columns = self._shape(place)
        inputs, outputs = (rows, columns) if place.embeds else (columns, rows)
        shapes = {"A": (rank, inputs), "B": (outputs, rank), "magnitude": (outputs,)}
        for part, value in parts.items():
            if tuple(value.shape) != shapes[part]:
                raise CheckpointError(
                    f"{self.file}: {part} of {place.name} has the shape {tuple(value.shape)}, and "
                    f"by {CONFIG} (r, rank_pattern) on this model it is {shapes[part]}; is the "
                    f"adapter another base model's ({self.raw.get('base_model_name_or_path')!r})?"
                )
        alpha = self._number("lora_alpha", "alpha_pattern", place.name)
        return Update(parts["A"], parts["B"], alpha, parts.get("magnitude"))

    def _number(self, key: str, patterns: str, name: str) -> Any:
        """Of a module, as PEFT looks it up: the first pattern that matches, else for all."""
        for pattern, value in (self.raw.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
            except re.error as error:
                raise CheckpointError(f"{self.config_file}: {patterns}: {error}") from None
        return self.raw[key]

    def _shape(self, place: Place) -> tuple[int, int]:
        """Rows and columns of all of ours in it, one above the other."""
        own = [self.shapes[f"{path}.weight"] for path in place.ours]
        return sum(shape[0] for shape in own), own[0][1]

    def _check_saved(self, named: Iterable[tuple[str, Tensor]]) -> None:
        for name, value in named:
            if name not in self.shapes:
                raise CheckpointError(f"{self.file}: {name}: no such parameter in this model")
            if tuple(value.shape) != self.shapes[name]:
                raise CheckpointError(
                    f"{self.file}: {name} has the shape {tuple(value.shape)}, and in this model "
                    f"{self.shapes[name]}; is the adapter another base model's "
                    f"({self.raw.get('base_model_name_or_path')!r})?"
                )

    def _refuse_tied(self, updates: Mapping[str, Update]) -> None:
        for path in ("embed", "head"):
            if path in updates and self.config.tie_embeddings:
                raise CheckpointError(
                    f"{self.config_file}: target_modules: {path} shares its weight with the other "
                    "end of the model (tie_word_embeddings), and an update of one of the two "
                    "cannot be merged; train without it, or on an untied model"
                )
