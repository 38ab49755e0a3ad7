"""A user's own DeepSpeed JSON beside the recipe: read, compared, and what is left passed on.

The recipe says layout, precision, clipping, batch and optimizer. Where the JSON says another thing
one of them is wrong, and nobody can know which. ``"auto"``, as Hugging Face's trainer has it, is
whatever the recipe says. ``config`` is a `DeepSpeedConfig` everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.config import yaml12
from shardwise.config.optimizers import AdamWConfig, SgdConfig
from shardwise.config.schema import StageConfig
from shardwise.errors import ConfigError
from shardwise.parallel.layout import Layout

MAX_BYTES = 1_000_000
PLACES = "(places)"  # of a file's values, kept beside them: where each was written

# What would change a sum, a mean or a dtype behind the recipe's back, and the value that does not.
FIXED: dict[str, tuple[Any, str]] = {
    "fp16.enabled": (False, "training is in bf16 or fp32"),
    "amp.enabled": (False, "apex's amp rounds where nobody declared it"),
    "torch_autocast.enabled": (False, "autocast rounds where nobody declared it"),
    "prescale_gradients": (False, "gradients are sums over data ranks, divided once"),
    "gradient_predivide_factor": (1.0, "gradients are sums over data ranks, divided once"),
    "gradient_allreduce_op": ("mean", "the engine multiplies by the data ranks itself"),
    "managed_gradient_accumulation": (True, "the engine says which micro-batch is the last"),
    "sparse_gradients": (False, "gradients are dense"),
    "communication_data_type": ("fp32", "gradients are reduced in fp32"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are summed in fp32"),
    "bf16.immediate_grad_update": (False, "gradients are summed in fp32"),
    "bf16.bf16_master_weights_and_grads": (False, "masters are fp32"),
    "bf16.bf16_optimizer_states": (False, "moments are fp32"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients are not quantised"),
    "zero_optimization.zero_quantized_weights": (False, "weights are not quantised"),
    "zero_optimization.zero_hpz_partition_size": (1, "masters are cut over all data ranks"),
    "zero_optimization.mics_shard_size": (-1, "masters are cut over all data ranks"),
    "zero_optimization.ignore_unused_parameters": (True, "a frozen part has no gradient"),
    "zero_optimization.round_robin_gradients": (False, "masters lie in parameters' order"),
    "zero_optimization.cpu_offload": (False, "engine.offload_optimizer says so"),
    "zero_optimization.super_offload": (False, "masters would lag behind"),
    "zero_optimization.offload_optimizer.super_offload": (False, "masters would lag behind"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "masters lie in one place"),
    "zero_optimization.elastic_checkpoint": (False, "checkpoints are this program's"),
    "zero_allow_untested_optimizer": (True, "optimizers are torch's own"),
    "zero_force_ds_cpu_optimizer": (False, "optimizers are torch's own"),
}
# Whole sections that are another program's part.
FOREIGN = {
    "scheduler": "stages[].schedule says the learning rate",
    "zenflow": "masters would lag behind",
    "compression_training": "it changes the model",
    "quantize_training": "it changes the model",
    "progressive_layer_drop": "it changes the model",
    "data_efficiency": "data is dealt by stages[].data",
    "curriculum_learning": "data is dealt by stages[].data",
    "tensor_parallel": "engine.layout says tp",
    "sequence_parallel_size": "engine.layout says cp",
    "pipeline": "engine.layout says pp",
    "moe": "no model has experts yet",
    "elasticity": "a resume may have another layout instead",
    "autotuning": "nothing is tuned while it trains",
    "load_universal_checkpoint": "shardwise convert reads such checkpoints",
}


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file, with the line of each value under `PLACES`.

    Raises ValueError that names file, line and mend.
    """
    try:
        with safe_files.open_regular(path) as stream:
            raw = stream.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES} bytes is no DeepSpeed config")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is a {type(data).__name__}, not a JSON object")
    try:
        tree = yaml12.parse(text.replace("\t", "  "), str(path))  # JSON is YAML with fewer ways
        lines = {dotted: str(tree.source(key)) for key, dotted in _keys(tree.data)}
    except ConfigError:
        lines = {}
    return {**data, PLACES: {"": str(path), **lines}}


def _keys(data: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            path = (*above, str(key))
            yield path, ".".join(path)
            yield from _keys(value, path)


def content(config: Any) -> dict[str, Any]:
    """The JSON as it was written."""
    found = config.config
    return {key: value for key, value in (found or {}).items() if key != PLACES}


def lookup(data: Any, dotted: str) -> Any:
    """A value; None: not said, or ``auto``."""
    for part in dotted.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return None if data == "auto" else data


def contradiction(config: Any, layout: Layout, stage: StageConfig | None = None) -> str | None:
    """Why the JSON and the recipe cannot both be right; None: they can."""
    data = content(config)
    places = (config.config or {}).get(PLACES, {})  # type: ignore[union-attr]

    def where(key: str) -> str:
        return f"engine.config {key} ({places[key]})" if key in places else f"engine.config {key}"

    for key, (value, why) in FIXED.items():
        said = lookup(data, key)
        if said is not None and said != value:
            return f"{where(key)}: {said!r}, but {why}; leave it out, or write {value!r}"
    for key, why in FOREIGN.items():
        said = data.get(key)
        off = said in (None, False, {}) or (isinstance(said, dict) and said.get("enabled") is False)
        if not off:
            return f"{where(key)}: {why}; leave it out"
    for key, name, wanted in _said(config, layout, stage):
        said = lookup(data, key)
        if said is not None and said != wanted:
            return f"{where(key)}: {said!r}, but {name} is {wanted!r}; make them agree"
    return None


def device_of(config: Any, key: str) -> str:
    """Where ``offload_optimizer`` or ``offload_param`` goes, by the recipe or by the JSON."""
    own: str = getattr(config, key)
    said = lookup(content(config), f"zero_optimization.{key}.device")
    return str(said) if own == "none" and said else own


def _said(config: Any, layout: Layout, stage: StageConfig | None) -> Iterator[tuple[str, str, Any]]:
    """What the recipe says under DeepSpeed's keys: (its key, ours, the value)."""
    yield "zero_optimization.stage", f"engine.layout {layout}, whose ZeRO stage", layout.zero
    yield "gradient_clipping", "engine.max_grad_norm", config.max_grad_norm
    if config.precision != "auto":
        yield (
            "bf16.enabled",
            f"that of engine.precision {config.precision}",
            (config.precision == "bf16"),
        )
    for key in ("offload_optimizer", "offload_param"):
        if getattr(config, key) != "none":
            yield f"zero_optimization.{key}.device", f"engine.{key}", getattr(config, key)
        if config.nvme_path is not None:
            path = str(config.nvme_path)
            yield f"zero_optimization.{key}.nvme_path", "engine.nvme_path", path
    if stage is None:
        return
    batch, name = stage.batch, f"stages.{stage.name}"
    yield "train_micro_batch_size_per_gpu", f"{name}.batch.micro_batch", batch.micro_batch
    if not stage.on_policy:
        steps = batch.global_batch / (batch.micro_batch * layout.dp)
        yield "train_batch_size", f"{name}.batch.global_batch", batch.global_batch
        yield "gradient_accumulation_steps", f"what {name}.batch comes to", steps
    yield from _optimizer(lookup(config.config, "optimizer") or {}, stage)


def _optimizer(said: Mapping[str, Any], stage: StageConfig) -> Iterator[tuple[str, str, Any]]:
    own, name = stage.optimizer, f"stages.{stage.name}.optimizer"
    kind = str(said.get("type", "")).lower()
    # DeepSpeed's Adam decouples its decay unless it is told not to.
    decoupled = lookup(said, "params.adam_w_mode") is not False
    meant = "adamw" if kind == "adam" and decoupled else kind
    yield "optimizer.type", f"{name}.kind", said.get("type") if meant == own.kind else own.kind
    yield "optimizer.params.lr", f"{name}.lr", own.lr
    yield "optimizer.params.weight_decay", f"{name}.weight_decay", own.weight_decay
    if isinstance(own, AdamWConfig):
        yield "optimizer.params.betas", f"{name}.beta1, beta2", [own.beta1, own.beta2]
        yield "optimizer.params.eps", f"{name}.eps", own.eps
    if isinstance(own, SgdConfig):
        yield "optimizer.params.momentum", f"{name}.momentum", own.momentum


def passed_on(config: Any) -> list[str]:
    """Keys of the JSON that the recipe says nothing about, which DeepSpeed gets as they are."""
    known = {*FIXED, *FOREIGN, "zero_optimization.stage", "gradient_clipping", "bf16.enabled"}
    known |= {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    return [
        dotted
        for path, dotted in _keys(content(config))
        if dotted not in known
        and path[0] != "optimizer"
        and not isinstance(lookup(config.config, dotted), Mapping)
    ]


def merged(config: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed is given: the JSON, and over it what the engine says."""
    mine = content(config)
    for key in ("optimizer", "scheduler"):
        mine.pop(key, None)
    return _over(_without_auto(mine), own)


def _without_auto(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in data.items()
        if value != "auto"
    }


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[key] = _over(old, value) if both else value  # type: ignore[arg-type]
    return found
