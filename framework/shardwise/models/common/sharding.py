"""Tensor-parallel styles, as data: which modules are cut, and along what.

A family's table is rows of (pattern of module path, style). Patterns are shell-style and match a
whole path; ``*`` stands for one layer index.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable
from typing import Literal

Style = Literal[
    "vocab",  # embedding: rows (vocabulary) are cut, outputs summed
    "column",  # linear: output features are cut, outputs stay cut (a scalar's: parts of a sum)
    "kv",  # like column, or, with fewer key/value heads than ranks, whole and used in part
    "row",  # linear: input features are cut, outputs summed
    "sequence",  # norm before column linears, on tokens cut among ranks (sp); weight whole
    "own_tokens",  # norm behind a row linear, on the same; weight whole
    "per_head",  # norm inside a head, on activations cut along the heads; weight whole
    "heads",  # norm over all query heads, or a number of each, cut along the heads
    "kv_heads",  # norm over all key heads, cut so, or, with fewer than ranks, used in part
    "tokens",  # embedding or dropout on tokens cut among ranks (sp); weight whole
]


@dataclasses.dataclass(frozen=True)
class ShardRule:
    """One row of the table."""

    modules: str
    style: Style


def style_of(table: Iterable[ShardRule], parameter: str) -> Style | None:
    """The style of the module that owns ``parameter`` (a full name), or None if no row matches."""
    module = parameter.rpartition(".")[0]
    for rule in table:
        if fnmatch.fnmatchcase(module, rule.modules):
            return rule.style
    return None
