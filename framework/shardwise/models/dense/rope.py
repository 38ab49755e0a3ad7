"""Rotary positions in configs: keys for stretching their frequencies, ours and transformers'."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from shardwise.config.schema import PositiveFloat, PositiveInt, Section
from shardwise.errors import CheckpointError
from shardwise.models.dense.release import ROPE_WORDS, WINDOW_WORDS, Fields, Part, Raw
from shardwise.ops.rope_scaling import RopeScaling


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


AsTuple = BeforeValidator(_as_tuple)
Factors = Annotated[tuple[PositiveFloat, ...], AsTuple]

# Keys of each kind, beside ``factor`` and ``original_max_seq_len``.
_KEYS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": (
        "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor",
    ),
    "longrope": ("short_factor", "long_factor", "attention_factor"),
}  # fmt: skip


class RopeScalingConfig(Section):
    """Stretching of the rotary frequencies; see `shardwise.ops.rope_scaling.RopeScaling`.

    ``dynamic`` stretches nothing up to the original length, and no model is made for more with it:
    frequencies that follow a batch's length are another computation on each layout.
    ``longrope`` has the long factors for all rows of a model whose max_seq_len is beyond the
    original length, where transformers takes the short ones for short batches: for those, set
    max_seq_len to the original length.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = Field(
        description="which rule"
    )
    factor: Annotated[float, Field(ge=1.0, le=1e6)] = Field(
        description="longer rows over those of pre-training", examples=[4.0]
    )
    original_max_seq_len: PositiveInt = Field(8192, description="tokens of a row in pre-training")
    low_freq_factor: PositiveFloat = Field(1.0, description="llama3")
    high_freq_factor: PositiveFloat = Field(4.0, description="llama3")
    beta_fast: PositiveFloat = Field(32.0, description="yarn")
    beta_slow: PositiveFloat = Field(1.0, description="yarn")
    truncate: bool = Field(True, description="yarn: bands begin and end at whole pairs")
    mscale: PositiveFloat | None = Field(
        None, description="yarn: of ln(factor) in the temperature", examples=[1.0]
    )
    mscale_all_dim: PositiveFloat | None = Field(
        None, description="yarn: of ln(factor) in what divides it", examples=[1.0]
    )
    attention_factor: PositiveFloat | None = Field(
        None, description="yarn, longrope; null: from factor", examples=[1.1]
    )
    short_factor: Factors = Field((), description="longrope: for the original length, a pair each")
    long_factor: Factors = Field((), description="longrope: for a longer max_seq_len")

    @model_validator(mode="after")
    def _bands_are_apart(self) -> RopeScalingConfig:
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must exceed low_freq_factor")
        if self.kind == "yarn" and self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must exceed beta_slow")
        return self

    def check(self, max_seq_len: int, width: int) -> None:
        """Raise ValueError where a model of ``max_seq_len`` cannot have this."""
        original = self.original_max_seq_len
        if self.kind == "dynamic" and max_seq_len > original:
            raise ValueError(
                f"rope_scaling.kind dynamic changes frequencies with the length of a batch beyond "
                f"{original} tokens, which no two layouts cut alike; set max_seq_len to {original} "
                "at most, or use yarn"
            )
        sizes = {len(self.short_factor), len(self.long_factor)}
        if self.kind == "longrope" and sizes != {width // 2}:
            raise ValueError(
                f"rope_scaling: short_factor and long_factor need {width // 2} numbers, one for "
                "each rotated pair"
            )

    def for_pairs(self, number: int) -> RopeScalingConfig:
        """The same for so many rotated pairs: of the factors that there are a pair each, some."""
        updates = {}
        for key in ("short_factor", "long_factor"):
            if held := getattr(self, key):
                updates[key] = tuple(held[i * len(held) // number] for i in range(number))
        return self.model_copy(update=updates)

    def scaling(self, max_seq_len: int) -> RopeScaling | None:
        """As the rotary op takes it, for a model of this context."""
        if self.kind == "dynamic":
            return None
        numbers = {key: getattr(self, key) for key in _KEYS[self.kind]}
        if self.kind == "longrope":
            short, long = numbers.pop("short_factor"), numbers.pop("long_factor")
            numbers["pair_factors"] = long if max_seq_len > self.original_max_seq_len else short
        if self.kind != "linear":
            numbers["original_max_seq_len"] = self.original_max_seq_len
        return RopeScaling(kind=self.kind, factor=self.factor, **numbers)


# --- transformers ---------------------------------------------------------------------------------

_KINDS = {"su": "longrope"}  # words of old
ORIGINAL = "original_max_position_embeddings"


def rope_of(raw: Raw) -> dict[str, Any]:
    """What a config.json says of them: transformers 5 in one place, 4 under two keys."""
    return dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})


def scaling_from_hf(rope: Raw, raw: Raw) -> RopeScalingConfig | None:
    """The stretching; raises CheckpointError for a kind that is not known here."""
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    kind = _KINDS.get(kind, kind)
    if kind == "default":
        return None
    if kind not in _KEYS:
        raise CheckpointError(
            f"config.json: rope type {kind!r} is not supported; supported: default, "
            f"{', '.join(_KEYS)}"
        )
    longest = int(raw.get("max_position_embeddings") or 2048)
    original = int(raw.get(ORIGINAL) or rope.get(ORIGINAL) or longest)  # as theirs
    numbers: dict[str, Any] = {k: rope[k] for k in _KEYS[kind] if rope.get(k) is not None}
    if kind != "linear":
        numbers["original_max_seq_len"] = longest if kind == "dynamic" else original
    factor: Any = rope.get("factor") or longest / original
    return RopeScalingConfig(kind=kind, factor=float(factor), **numbers)  # type: ignore[arg-type]


def scaling_to_hf(said: RopeScalingConfig | None) -> dict[str, Any] | None:
    """The same in their words."""
    if said is None:
        return None
    raw: dict[str, Any] = {"rope_type": said.kind, "factor": said.factor}
    if said.kind not in ("linear", "dynamic"):
        raw[ORIGINAL] = said.original_max_seq_len
    plain = RopeScalingConfig(kind="linear", factor=1.0)
    for key in _KEYS[said.kind]:
        value = getattr(said, key)
        if said.kind == "llama3" or value != getattr(plain, key):
            raw[key] = list(value) if isinstance(value, tuple) else value
    return raw


def _read(raw: Raw) -> Fields:
    rope = rope_of(raw)
    base = rope["rope_theta"] if "rope_theta" in rope else raw["rope_theta"]
    return {"rope_base": float(base), "rope_scaling": scaling_from_hf(rope, raw)}


def _write(c: Any) -> Fields:
    return {"rope_theta": c.rope_base, "rope_scaling": scaling_to_hf(c.rope_scaling)}


ROPE = Part(ROPE_WORDS, _read, _write)  # one for all layers

# --- windows --------------------------------------------------------------------------------------

_TYPES = {"full_attention": "full", "sliding_attention": "window"}
_NAMES = {ours: theirs for theirs, ours in _TYPES.items()}


def types_from_hf(raw: Raw) -> list[str]:
    """Layer types in our words; raises CheckpointError for others."""
    found = raw["layer_types"]
    if unknown := sorted(set(found) - set(_TYPES)):
        raise CheckpointError(
            f"config.json: layer_types {', '.join(unknown)}: full and sliding attention alone"
        )
    if len(found) != raw["num_hidden_layers"]:
        raise CheckpointError(
            f"config.json: layer_types are {len(found)}, and there are {raw['num_hidden_layers']} "
            "layers"
        )
    return [_TYPES[name] for name in found]


def types_to_hf(windows: list[int | None]) -> list[str]:
    """Layer types in their words."""
    return [_NAMES["full" if w is None else "window"] for w in windows]


def window_types(every: int = 0, word: str | None = None, *, first: bool = False) -> Part:
    """Layers by ``layer_types``; where they are not said, one of ``every`` so many is full.

    It is the last of them, or the ``first``; 0: none is. ``word``: a key that may say another
    number.
    """
    ahead = 0 if first else 1

    def read(raw: Raw) -> Fields:
        layers = range(raw["num_hidden_layers"])
        if raw.get("layer_types") is None:
            number = every if word is None else raw.get(word, every)
            types = ["full" if number and (i + ahead) % number == 0 else "window" for i in layers]
        else:
            types = types_from_hf(raw)
        return {"sliding_window": raw["sliding_window"], "layer_types": pattern_of(types)}

    def write(c: Any) -> Fields:
        return {"sliding_window": c.sliding_window, "layer_types": types_to_hf(c.windows())}

    return Part(WINDOW_WORDS if word is None else (*WINDOW_WORDS, word), read, write)


def pattern_of(values: list[Any]) -> tuple[Any, ...]:
    """The shortest pattern that gives these values when it is repeated."""
    sizes = range(1, len(values) + 1)
    size = next(n for n in sizes if all(v == values[i % n] for i, v in enumerate(values)))
    return tuple(values[:size])
