"""The byte-level BPE tokenizer of a GGUF file's metadata, as a Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.errors import CheckpointError
from shardwise.models.dense.llama import LlamaConfig

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(max_digits: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS % max_digits}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _byte_level(True),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(True)]},
    "llama-bpe": _split("1,3"),
    "qwen2": _split("1"),
}
_NORMALIZERS: dict[str, dict[str, Any]] = {"qwen2": {"type": "NFC"}}


def tokenizer_json(fields: Mapping[str, Any], bos_id: int | None) -> dict[str, Any]:
    """Contents of tokenizer.json; raises CheckpointError for a kind that is not byte-level BPE."""
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise CheckpointError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; supported: "
            f"byte-level BPE with {', '.join(_PRE_TOKENIZERS)}"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    merges = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
    added = [
        {
            "id": i,
            "content": token,
            "special": kind == _CONTROL,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    if not fields.get("tokenizer.ggml.add_bos_token", False):
        bos_id = None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None if bos_id is None else _bos_first(tokens[bos_id], bos_id),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _bos_first(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts one token before every text."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 0}}
    special = {"id": token, "ids": [token_id], "tokens": [token]}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {token: special},
    }


def tokenizer_config(
    names: Mapping[str, str], chat_templates: Mapping[str, str], config: LlamaConfig
) -> dict[str, Any]:
    """Contents of tokenizer_config.json, as transformers reads it."""
    found: dict[str, Any] = {f"{kind}_token": token for kind, token in names.items()}
    if list(chat_templates) == ["default"]:
        found["chat_template"] = chat_templates["default"]
    elif chat_templates:
        listed = [{"name": n, "template": t} for n, t in chat_templates.items()]
        found["chat_template"] = listed
    return found | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
