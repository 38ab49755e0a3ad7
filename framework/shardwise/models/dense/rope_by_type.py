"""Rotary positions of families whose layers with a window have others than those without."""

from __future__ import annotations

from typing import Any

from shardwise.errors import CheckpointError
from shardwise.models.dense.config import DenseConfig
from shardwise.models.dense.release import ROPE_WORDS, Fields, Part, Raw
from shardwise.models.dense.rope import rope_of, scaling_from_hf, scaling_to_hf
from shardwise.ops.rope_scaling import RopeSpec

_FULL, _WINDOW = "full_attention", "sliding_attention"


def ropes_of(config: DenseConfig, local_base: float) -> list[RopeSpec | None]:
    """Those of a config's layers: ``rope_scaling`` stretches full attention alone."""
    whole, local = config.rope(), RopeSpec(width=config.head_width, base=local_base)
    return [whole if type_ == "full" else local for type_ in config.types()]


def ropes_by_type(local_word: str, local_base: float) -> Part:
    """``rope_base``, ``rope_scaling`` and ``local_rope_base``.

    transformers 5 says them for each type of layer; 4 says both bases, and what stretches one.
    ``local_word`` and ``local_base``: 4's key, and its default.
    """

    def read(raw: Raw) -> Fields:
        said = rope_of(raw)
        if _FULL in said or _WINDOW in said:
            whole, local = said.get(_FULL) or {}, said.get(_WINDOW) or {}
        else:
            whole, local = said, {}
        if scaling_from_hf(local, raw) is not None:
            raise CheckpointError(
                "config.json: rope_parameters stretches layers of sliding_attention, which no "
                "release does"
            )
        base: Any = whole["rope_theta"] if "rope_theta" in whole else raw["rope_theta"]
        if not local and local_word == "rope_theta" and base != local_base:
            raise CheckpointError(
                f"config.json: rope_theta = {base!r}: of layers with a window, transformers 4 "
                f"takes it too, and 5 takes {local_base!r}; write rope_parameters by type of layer"
            )
        own: Any = local.get("rope_theta", raw.get(local_word, local_base))
        return {
            "rope_base": float(base),
            "local_rope_base": float(own),
            "rope_scaling": scaling_from_hf(whole, raw),
        }

    def write(c: Any) -> Fields:
        plain = {"rope_type": "default"}
        scaling = scaling_to_hf(c.rope_scaling)
        return {
            local_word: c.local_rope_base,
            "rope_theta": c.rope_base,
            "rope_scaling": scaling,
            "rope_parameters": {
                _FULL: (scaling or plain) | {"rope_theta": c.rope_base},
                _WINDOW: plain | {"rope_theta": c.local_rope_base},
            },
        }

    return Part((*ROPE_WORDS, local_word), read, write)
