"""How a class of transformers says what a config of ours says: a table, and two functions over it.

A family has a release for each class that computes it. What all classes call alike stands in
`KEYS`; a release adds its own. No torch here: the tables stand beside the configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from shardwise.errors import CheckpointError, ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.hf_config import head_from_hf, head_to_hf, refuse_foreign

Raw = Mapping[str, Any]
Fields = dict[str, Any]

# Ours against theirs.
KEYS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
# What a class takes for a key that is not there, if its release says nothing else.
DEFAULTS = {
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
}
# Of a class's own sizes, which a config.json that transformers wrote need not say.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads",
)  # fmt: skip
# Keys that releases read and may say in other words.
ROPE_WORDS = ("rope_parameters", "rope_scaling", "rope_theta")
WINDOW_WORDS = ("layer_types", "sliding_window")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Release:
    """One class of transformers; ``name`` is Gemma2 for Gemma2ForCausalLM."""

    model_type: str
    name: str
    config: type[DecoderConfig]
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # ours against theirs
    defaults: Raw = dataclasses.field(default_factory=dict)
    sizes: tuple[int, ...] = ()  # defaults of `SIZES`
    # Keys that may have these values alone; the first is the class's own, and is written.
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()  # what takes more than one key to say
    fixed: Raw = dataclasses.field(default_factory=dict)  # fields of ours that no key says
    base_keys: Mapping[str, str] = dataclasses.field(default_factory=lambda: KEYS)
    decoder: str = "ForCausalLM"
    scorer: str | None = None  # the name before ForSequenceClassification, where it is another

    @property
    def words(self) -> frozenset[str]:
        """All keys of theirs that are read."""
        said = {*self.base_keys.values(), *self.keys.values(), *self.only}
        return frozenset(said.union(*(part.words for part in self.parts)))

    def read(self, raw: Raw) -> DecoderConfig:
        """Our config; raises CheckpointError for what the class computes and we do not."""
        refuse_foreign(raw, self.words)
        raw = DEFAULTS | dict(zip(SIZES, self.sizes)) | dict(self.defaults) | dict(raw)
        for key, values in self.only.items():
            if raw.get(key, values[0]) not in values:
                raise CheckpointError(
                    f"config.json: {key} = {raw[key]!r} is not supported by the "
                    f"{self.config.model_fields['family'].default} family; supported: "
                    f"{', '.join(map(repr, values))}"
                )
        keys = {**self.base_keys, **self.keys}
        fields = {ours: raw[theirs] for ours, theirs in keys.items()}
        if "num_kv_heads" in keys and fields.get("num_kv_heads") is None:
            fields["num_kv_heads"] = fields["num_heads"]
        for part in self.parts:
            fields |= part.read(raw)
        fields |= dict(self.fixed) | head_from_hf(raw, tied=bool(raw["tie_word_embeddings"]))
        return self.config(**fields)

    def write(self, config: DecoderConfig) -> Fields:
        """A config.json that transformers 4 and 5 load; see `lacks` for what it may not say."""
        keys = {**self.base_keys, **self.keys}
        raw = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
        raw |= {key: values[0] for key, values in self.only.items()}
        for part in self.parts:
            raw |= part.write(config)
        raw |= {"tie_word_embeddings": config.tie_embeddings, "model_type": self.model_type}
        head = head_to_hf(config.head, self.scorer or self.name, self.name + self.decoder)
        return raw | head if config.head == "scalar" else head | raw

    def lacks(self, config: DecoderConfig) -> list[str]:
        """Switches of ``config`` that its class has otherwise, by name; none: it computes the same.

        Dropout is how a model is trained, and need not be said.
        """
        try:
            said = self.read(self.write(config))
        except (CheckpointError, ConfigError, ValueError) as error:
            return [str(error)]
        ours, theirs = config.without_dropout(), said.without_dropout()
        if ours.spec == theirs.spec and ours.max_seq_len == theirs.max_seq_len:
            return []
        fields = ours.model_dump()
        return [k for k, v in theirs.model_dump().items() if fields.get(k) != v]


@dataclasses.dataclass(frozen=True)
class Part:
    """Fields of ours that several keys of theirs say together."""

    words: tuple[str, ...]
    read: Callable[[Raw], Fields]
    write: Callable[[Any], Fields]


# --- heads ----------------------------------------------------------------------------------------


def _head_width_from_hf(raw: Raw) -> Fields:
    hidden, heads, width = raw["hidden_size"], raw["num_attention_heads"], raw.get("head_dim")
    return {"head_dim": None if width is None or width * heads == hidden else width}


def _unusual_head_width(c: Any) -> Fields:
    return {} if c.head_dim is None else {"head_dim": c.head_dim}


HEAD_WIDTH = Part(("head_dim",), _head_width_from_hf, lambda c: {"head_dim": c.head_width})
# Of classes that have no such key of their own, but heed it.
HEAD_WIDTH_BESIDE = Part(("head_dim",), _head_width_from_hf, _unusual_head_width)


def _as_wide_from_hf(raw: Raw) -> Fields:
    fields = _head_width_from_hf(raw)
    if fields["head_dim"] is not None:
        raise CheckpointError(
            f"config.json: head_dim = {raw['head_dim']}: the heads of {raw['model_type']}'s class "
            "are as wide together as hidden_size"
        )
    return fields


# Of classes that have the key, and compute nothing else than the usual.
HEAD_WIDTH_USUAL = Part(HEAD_WIDTH.words, _as_wide_from_hf, HEAD_WIDTH.write)

# --- biases of all four projections of attention, or of none --------------------------------------

ATTENTION_BIAS = Part(
    ("attention_bias",),
    lambda raw: dict.fromkeys(("qkv_bias", "o_bias"), bool(raw.get("attention_bias", False))),
    lambda c: {"attention_bias": c.qkv_bias},
)
