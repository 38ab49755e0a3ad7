"""Reads a sentencepiece ``.model`` (BPE or unigram) into a tokenizer.json.

The file is a protocol buffer; the few fields needed are read here, so no library is. What the
library does on encoding is expressed in the parts of ``tokenizers``:

- normalise: the model's character map, extra spaces, one space in front, spaces as U+2581;
- BPE joins the two neighbours whose union has the best score, so every way to cut a piece in two
  is a merge, ranked by the piece's score;
- unigram takes the path of the best sum of scores, where a user-defined symbol always wins, and
  control and byte pieces never do: the library does not find them in text.

Ids equal the library's on all texts that the tests try, but for two cases of unigram: paths of
equal score (the same pieces in another order, as in a line of ``=``), and text that spells out the
name of a control or byte piece.
Format: sentencepiece_model.proto of sentencepiece.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from shardwise import safe_files
from shardwise.data.fast_tokenizer import FastTokenizer, is_library_error, special
from shardwise.data.tokenizer_config import end_ids, read_settings
from shardwise.errors import DataError
from shardwise.models import travel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_UNIGRAM, _BPE = 1, 2
_OUT_OF_REACH = -1e4  # a score below any path of ordinary pieces
_SPACE = "\u2581"


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def load_sentencepiece(path: Path | str) -> FastTokenizer:
    """A tokenizer with the ids of a sentencepiece model; DataError if the file is damaged."""
    path = Path(path)
    try:
        raw = safe_files.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _build(path, raw)
    except DataError:
        raise
    except BaseException as error:  # of a damaged file, here or in the library
        if not is_library_error(error):
            raise
        raise DataError(f"{path}: {error}; not a sentencepiece model") from error


def _build(path: Path, raw: bytes) -> FastTokenizer:
    model = list(_fields(raw))
    pieces = [_piece(v) for n, v in model if n == 1 and isinstance(v, bytes)]
    trainer = _message(model, 2)
    normalizer = _message(model, 3)
    kind = trainer.get(3, _UNIGRAM)
    if not pieces or kind not in (_UNIGRAM, _BPE):
        raise DataError(f"{path}: byte 0: not a sentencepiece model of kind BPE or unigram")
    byte_fallback = bool(trainer.get(35, 0))
    dummy_prefix = bool(normalizer.get(3, 1))
    user_defined = [p.text for p in pieces if p.kind == _USER_DEFINED]
    if kind == _UNIGRAM:
        backend = Backend(_unigram(pieces, byte_fallback))
        backend.pre_tokenizer = _guard(pieces)
    elif user_defined and dummy_prefix:
        raise DataError(
            f"{path}: a BPE with user-defined symbols and a space in front has no equal "
            "tokenizer.json; give the one that its makers publish, if they do"
        )
    else:
        backend = Backend(_bpe(pieces, byte_fallback))
        backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in user_defined])
    backend.normalizer = _normalizer(normalizer)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if dummy_prefix else []),
        ]
    )
    backend.add_special_tokens([special(p.text) for p in pieces if p.kind == _CONTROL])
    control = {p.text for p in pieces if p.kind == _CONTROL}
    defaults = {46: b"<s>", 47: b"</s>", 48: b"<pad>"}
    names = [_text(trainer.get(n, default)) for n, default in defaults.items()]
    bos, eos, pad = (n if n in control else None for n in names)
    if eos is None:
        raise DataError(f"{path}: the model has no end token; train it with one")
    files, config = read_settings(path.parent)
    return FastTokenizer(
        backend,
        eos=eos,
        bos=bos,
        pad=pad,
        chat_template=config["chat_template"],
        files=files | {travel.SENTENCEPIECE: raw},
        ends=end_ids(path.parent),
    )


def _unknown(pieces: list[_Piece]) -> int:
    found = next((i for i, p in enumerate(pieces) if p.kind == _UNKNOWN), None)
    if found is None:
        raise ValueError("no piece is marked as the unknown one")
    return found


def _bpe(pieces: list[_Piece], byte_fallback: bool) -> models.BPE:
    vocab = {p.text: i for i, p in enumerate(pieces)}
    ordinary = {p.text for p in pieces if p.kind == _NORMAL}
    merges = []
    for piece in sorted((p for p in pieces if p.kind == _NORMAL), key=lambda p: -p.score):
        for cut in range(1, len(piece.text)):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in ordinary and right in ordinary:
                merges.append((left, right))
    return models.BPE(
        vocab=vocab,
        merges=merges,
        unk_token=pieces[_unknown(pieces)].text,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _unigram(pieces: list[_Piece], byte_fallback: bool) -> models.Unigram:
    best = max(p.score for p in pieces if p.kind == _NORMAL)
    scores = {_NORMAL: lambda p: p.score, _USER_DEFINED: lambda p: len(p.text) * best - 0.1}
    vocab = [(p.text, scores.get(p.kind, lambda _: _OUT_OF_REACH)(p)) for p in pieces]
    return models.Unigram(vocab, unk_id=_unknown(pieces), byte_fallback=byte_fallback)


def _guard(pieces: list[_Piece]) -> pre_tokenizers.PreTokenizer:
    """Splits the name of a control or byte piece after its first character, wherever text spells
    one: the unigram model would otherwise prefer it to characters that it does not know."""
    hidden = [p.text for p in pieces if p.kind not in (_NORMAL, _USER_DEFINED) and len(p.text) > 1]
    pattern = "|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in hidden)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _normalizer(spec: dict[int, bytes | int]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    charsmap = spec.get(2)
    if isinstance(charsmap, bytes) and charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if spec.get(4, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.get(3, 1):
        steps.append(normalizers.Prepend(_SPACE))
    if spec.get(5, 1):
        steps.append(normalizers.Replace(" ", _SPACE))
    return normalizers.Sequence(steps)


def _message(fields: list[tuple[int, bytes | int]], number: int) -> dict[int, bytes | int]:
    """The last value of each field of a nested message; empty when the message is absent."""
    raw = next((v for n, v in fields if n == number), b"")
    return dict(_fields(raw)) if isinstance(raw, bytes) else {}


def _piece(raw: bytes) -> _Piece:
    fields = dict(_fields(raw))
    score = fields.get(2, b"\0\0\0\0")
    if 1 not in fields:
        raise ValueError("a piece has no text")
    if isinstance(score, int) or len(score) != 4:
        raise ValueError("the score of a piece is no 32-bit float")
    # Nine digits hold a float32, and are read back from JSON as they were written.
    value = float(f"{struct.unpack('<f', score)[0]:.9g}")
    return _Piece(_text(fields[1]), value, int(fields.get(3, _NORMAL)))


def _text(value: bytes | int) -> str:
    if isinstance(value, int):
        raise ValueError("a number where a text belongs")
    return value.decode("utf-8")


def _fields(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) of a protocol buffer message: varints as int, all else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if shift > 70:
                raise ValueError(f"byte {at}: a number of more than 64 bits")
            if byte < 128:
                return value

    while at < len(raw):
        start, tag = at, varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        if tag & 7 not in (1, 2, 5):
            raise ValueError(f"byte {start}: no protocol buffer field")
        size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        if at + size > len(raw):
            raise ValueError(f"byte {start}: truncated")
        yield tag >> 3, raw[at : at + size]
        at += size
