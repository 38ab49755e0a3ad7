"""From a config, a file or a folder to a `Tokenizer`; see `fast_tokenizer` for what that is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, overload

from tokenizers import Tokenizer as Backend

from shardwise import hub, integrity, safe_files
from shardwise.config.paths import expand
from shardwise.config.schema import TokenizerConfig
from shardwise.data.fast_tokenizer import (
    END_OF_TURN,
    EOS,
    IM_END,
    IM_START,
    PAD,
    SPECIAL_TOKENS,
    ByteTokenizer,
    FastTokenizer,
    Tokenizer,
    byte_alphabet,
    fingerprint_of,
    is_library_error,
    special,
    train_bpe,
)
from shardwise.data.files import hash_file
from shardwise.data.sentencepiece_model import load_sentencepiece
from shardwise.data.tiktoken_file import load_tiktoken
from shardwise.data.tokenizer_config import end_ids, read_settings, token_text
from shardwise.errors import DataError, UserError
from shardwise.models import travel

__all__ = [
    "END_OF_TURN",
    "EOS",
    "IM_END",
    "IM_START",
    "PAD",
    "SPECIAL_TOKENS",
    "ByteTokenizer",
    "FastTokenizer",
    "Tokenizer",
    "byte_alphabet",
    "load_tokenizer",
    "special",
    "tokenizer_fingerprint",
    "train_bpe",
]


def load_tokenizer(
    source: TokenizerConfig | Path | str, texts: Iterable[str] | None = None
) -> Tokenizer:
    """The tokenizer that a config describes, or that a file or folder holds.

    A folder or file: what `save` or Hugging Face wrote (tokenizer.json), or a sentencepiece
    ``.model``. ``texts`` train the BPE of ``kind: bpe`` (without a path). Raises UserError for
    what is missing in the config, DataError for a file that cannot be read.
    """
    if not isinstance(source, TokenizerConfig):
        return _load_path(_place(source))
    template, path = _template(source.chat_template), _place(source.path)
    if source.kind == "bytes":
        return ByteTokenizer(chat_template=template)
    if source.kind == "bpe" and path is None:
        if texts is None:
            raise UserError("tokenizer.kind bpe needs texts to train on, or tokenizer.path")
        return train_bpe(texts, source.vocab_size, chat_template=template)
    if path is None:
        raise UserError(f"tokenizer.kind {source.kind} needs tokenizer.path")
    tokenizer: Tokenizer
    if source.kind == "tiktoken":
        tokenizer = load_tiktoken(path, source.split)
    elif source.kind == "sentencepiece":
        tokenizer = load_sentencepiece(path)
    else:
        tokenizer = _load_path(path)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def tokenizer_fingerprint(config: TokenizerConfig) -> str:
    """Hash of what a tokenizer section asks for: its keys that matter, and its files' contents."""
    trained = config.kind == "bpe" and config.path is None
    said: list[Any] = ["bpe" if trained else config.kind, _template(config.chat_template)]
    if trained:
        said += [config.vocab_size, config.sample_bytes]
    if config.split is not None:
        said.append(config.split)
    if (path := _place(config.path)) is not None:
        folder = path if path.is_dir() else path.parent
        beside = ("tokenizer_config.json", "chat_template.jinja")
        inside = ("tokenizer.json", "tokenizer.model") if path.is_dir() else ()
        files = [folder / name for name in (*inside, *beside)]
        files += [] if path.is_dir() else [path]
        said += [hash_file(file) for file in files if file.is_file()]
    return fingerprint_of(*said)


@overload
def _place(path: Path | str) -> Path: ...
@overload
def _place(path: None) -> None: ...
def _place(path: Path | str | None) -> Path | None:
    """Where a tokenizer's files lie that a path or a hub name means."""
    return None if path is None else hub.local_folder(expand(path), "model")


def _load_path(path: Path) -> Tokenizer:
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer file or folder")
    if path.suffix == ".gguf":
        return _load_gguf(path)
    if path.name == travel.TOKENIZER:  # what stands beside it belongs to it
        path = path.parent
    integrity.check_folder(path if path.is_dir() else path.parent, weights=False)
    if path.suffix == ".model" or (path.is_dir() and not (path / "tokenizer.json").exists()):
        model = path / "tokenizer.model" if path.is_dir() else path
        if not model.exists():
            raise DataError(f"{path}: holds neither tokenizer.json nor tokenizer.model")
        return load_sentencepiece(model)
    file = path / "tokenizer.json" if path.is_dir() else path
    files, config = read_settings(file.parent)
    if path.is_dir():
        files |= travel.read(path, travel.VOCABULARIES)
    try:
        files[travel.TOKENIZER] = safe_files.read_bytes(file)
        backend = Backend.from_str(files[travel.TOKENIZER].decode("utf-8"))
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise DataError(f"{file}: not a tokenizer.json: {error}") from error
    ends = end_ids(file.parent)
    names = {k: token_text(config, f"{k}_token", file.parent) for k in ("eos", "bos", "pad")}
    guesses = (*map(backend.id_to_token, ends), *END_OF_TURN[::-1], "<eos>")
    eos = names["eos"] or next((t for t in guesses if t and _has(backend, t)), None)
    if eos is None:
        raise DataError(f"{file}: no end token; name it as eos_token in tokenizer_config.json")
    try:
        made = FastTokenizer(
            backend,
            eos=eos,
            bos=names["bos"],
            pad=names["pad"],
            chat_template=config["chat_template"],
            files=files,
            ends=ends,
        )
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    if names["pad"] is None and _has(backend, PAD):
        made.pad_id = made.id_of(PAD)  # for our own use; the tokenizer names none
    return made


def _load_gguf(path: Path) -> Tokenizer:
    from shardwise.models.gguf import from_gguf

    with tempfile.TemporaryDirectory() as folder:
        travel.write(Path(folder), from_gguf(path).files())
        return _load_path(Path(folder))


def _has(backend: Backend, token: str) -> bool:
    return backend.token_to_id(token) is not None


def _template(value: str | None) -> str | None:
    """A chat template given as Jinja source, or as the path of a file that holds it."""
    if value is None or "{" in value or "\n" in value:
        return value
    try:
        return safe_files.read_text(expand(value)).removeprefix("\ufeff")
    except (OSError, ValueError) as error:  # the latter: not UTF-8, or no name of a file
        raise UserError(f"tokenizer.chat_template: cannot read {value!r}: {error}") from error
