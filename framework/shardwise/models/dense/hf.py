"""The rules by which tensors of a dense family go to transformers' names and back."""

from __future__ import annotations

import dataclasses

from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.hf import Rule
from shardwise.models.common.hf_config import HEADS
from shardwise.models.common.spec import Shape
from shardwise.models.dense.names import Modules, Names

_KINDS = ("weight", "bias")


def rules(config: DecoderConfig, names: Names) -> list[Rule]:
    """Every tensor of the checkpoint."""
    spec, found = config.spec, []
    shapes = spec.shapes()
    for ours, theirs in names.ends.items():
        if ours != "norm":
            found += _of_module("", ours, theirs, shapes, names)
    for i, layer in enumerate(spec.layers):
        own = layer.shapes()
        for modules, module in names.layer.items():
            made = _of_module(f"layers.{i}.", modules, f"{names.layers}{i}.{module}", own, names)
            if module in names.by_head:
                made = [dataclasses.replace(rule, heads=layer.num_heads) for rule in made]
            found += made
    found += _of_module("", "norm", names.ends["norm"], shapes, names)
    if not config.tie_embeddings:
        head = names.head if config.head == "vocabulary" else HEADS[config.head]
        found.append(Rule(head, ("head.weight",)))
    return found


def _of_module(
    stem: str, modules: Modules, theirs: str, shapes: dict[str, Shape], names: Names
) -> list[Rule]:
    """The rules of one module of theirs, as far as ours are there."""
    several = (modules,) if isinstance(modules, str) else modules
    found = []
    for kind in _KINDS:
        ours = [f"{module}.{kind}" for module in several]
        if all(name in shapes for name in ours):
            rows = tuple(shapes[name][0] for name in ours)
            turned = kind == "weight" and theirs.endswith(tuple(names.transposed))
            full = tuple(stem + name for name in ours)
            name = theirs if theirs.endswith(tuple(names.bare)) else f"{theirs}.{kind}"
            found.append(Rule(name, full, rows, bool(names.transposed) and turned))
    return found
