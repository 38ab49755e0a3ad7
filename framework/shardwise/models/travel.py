"""What travels with a model besides its weights: one table, for reading, training and export.

The files of its tokenizer, its config.json and its generation_config.json go on as they are, byte
by byte, from a Hugging Face folder through a run and its checkpoints to the folder of an export.
What we know better (weights' dtype, a longer context, further end tokens) is written over them. Of
a multimodal model, the config.json is its text model's (`text_part`).
Names: transformers 5, `tokenization_utils_base.py` and the vocabulary files of its tokenizers.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shardwise import safe_files
from shardwise.errors import CheckpointError
from shardwise.models import text_part

CONFIG, GENERATION = text_part.CONFIG, "generation_config.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"

MODEL = (CONFIG, GENERATION)
# What may stand beside a vocabulary of any name, and says how it is used.
SETTINGS = (
    TOKENIZER_CONFIG, SPECIAL_TOKENS, "added_tokens.json", TEMPLATE, f"{MORE_TEMPLATES}/*.jinja",
)  # fmt: skip
VOCABULARIES = (
    TOKENIZER, SENTENCEPIECE, "vocab.json", "merges.txt", "vocab.txt", "vocab.bpe", "encoder.json",
    "spiece.model", "sentencepiece.bpe.model", "spm.model", "tiktoken.model", "*.tiktoken",
    "tekken.json", "tokenizer.model.v*",
)  # fmt: skip
ALL = (*VOCABULARIES, *SETTINGS, *MODEL)

# Keys of a config.json from which transformers makes a generation config where there is no file.
_OLD_GENERATION = (
    "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "num_beams",
    "length_penalty", "no_repeat_ngram_size", "max_length", "min_length", "bad_words_ids",
)  # fmt: skip
_MAX_ID = 2**24  # as `config.schema` bounds vocabularies
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # what a checkpoint may hold


def read(folder: Path, names: Iterable[str] = ALL) -> dict[str, bytes]:
    """The files of ``folder`` that travel, by name.

    This and what follows raise CheckpointError, beginning with the name of the file at fault; here
    DataError for what is no regular file.
    """
    found: dict[str, bytes] = {}
    for pattern in names:
        for path in sorted(folder.glob(pattern)):
            if path.is_dir():
                continue
            name = path.relative_to(folder).as_posix()
            if not _NAME.fullmatch(path.name):
                raise CheckpointError(f"{name}: rename it to letters, digits and ._- alone")
            try:
                found[name] = safe_files.read_bytes(path)
            except OSError as error:
                raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from error
    if CONFIG in found and text_part.is_whole(raw := parse(found, CONFIG)):
        found[CONFIG] = dump(text_part.own_config(raw, folder))
    return found


def among(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Of files by name, those that travel."""
    return {n: d for n, d in files.items() if any(fnmatch.fnmatchcase(n, p) for p in ALL)}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a folder, which is made."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def parse(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in one of the files; empty when it is not there."""
    try:
        found = safe_files.parse_json(files.get(name, b"{}"))
    except ValueError as error:
        raise CheckpointError(f"{name}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: must hold a JSON object")
    return found


def dump(value: Mapping[str, Any]) -> bytes:
    """A JSON object as it is written beside a model."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def generation(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The generation config that transformers uses: the file, or else what config.json says."""
    if GENERATION in files:
        return parse(files, GENERATION)
    config = parse(files, CONFIG)
    ids = [f"{kind}_token_id" for kind in ("bos", "eos", "pad")]
    return {k: config[k] for k in (*_OLD_GENERATION, *ids) if config.get(k) is not None}


def end_ids(files: Mapping[str, bytes]) -> tuple[int, ...]:
    """The tokens after which transformers stops generating, as far as the files say."""
    said = generation(files).get("eos_token_id")
    ids = [] if said is None else said if isinstance(said, list) else [said]
    if any(type(i) is not int or not 0 <= i < _MAX_ID for i in ids):
        where = GENERATION if GENERATION in files else CONFIG
        raise CheckpointError(f"{where}: eos_token_id is {said!r}; allowed: an id or a list of ids")
    return tuple(ids)


def template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The chat template: of its own file, or of ``config``; of several by name, the default one."""
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{TEMPLATE}: byte {error.start}: not UTF-8") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        default = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = default[0].get("template") if default else None
    if not isinstance(found, str | None):
        raise CheckpointError(f"{TOKENIZER_CONFIG}: chat_template must be a text")
    return found


def with_template(files: Mapping[str, bytes], template: str) -> dict[str, bytes]:
    """The files with another default chat template, wherever they hold one; others by name stay."""
    config = parse(files, TOKENIZER_CONFIG)
    said: Any = template
    if isinstance(named := config.get("chat_template"), list):
        others = [t for t in named if not isinstance(t, dict) or t.get("name") != "default"]
        said = [{"name": "default", "template": template}, *others]
    changed = {**files, TOKENIZER_CONFIG: dump(config | {"chat_template": said})}
    if any(name.startswith((TEMPLATE, MORE_TEMPLATES)) for name in files):  # a file counts more
        changed[TEMPLATE] = template.encode()
    return changed
