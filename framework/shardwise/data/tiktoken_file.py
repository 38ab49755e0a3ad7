"""Reads a ``.tiktoken`` file (one ``base64-token rank`` a line) into a tokenizer.json.

The file holds ranks only. BPE merges follow from them: a token's last merge joins the two parts
into which the lower ranks alone leave it. The pattern that splits text and the numbers of the
control tokens are not in the file; they are known for the public vocabularies by name. Of any
other file the recipe must say how it splits; it gets our control tokens at its end.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from shardwise import safe_files
from shardwise.data.fast_tokenizer import (
    EOS,
    MAX_VOCABULARY,
    PAD,
    SPECIAL_TOKENS,
    FastTokenizer,
    byte_alphabet,
    special,
)
from shardwise.errors import DataError, UserError

_MAX_TOKEN = 1024  # in base 64; the published ones are at most 128 bytes

# The published split patterns and control tokens of OpenAI's vocabularies.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CLITIC = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CLITIC}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CLITIC}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN: dict[str, tuple[str, dict[str, int]]] = {
    "r50k": (_GPT2, {EOS: 50256}),
    "p50k": (_GPT2, {EOS: 50256}),
    "cl100k": (
        _CL100K,
        {
            EOS: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k": (_O200K, {EOS: 199999, "<|endofprompt|>": 200018}),
}


SPLITS = {"gpt2": _GPT2, "cl100k": _CL100K, "o200k": _O200K}


def load_tiktoken(path: Path | str, split: str | None = None) -> FastTokenizer:
    """A tokenizer with the ids of a tiktoken file.

    ``split`` (of `SPLITS`) says how text is split, None: as the public vocabulary whose name is in
    the file's. Raises DataError naming file and line of damage, UserError for an unknown splitting.
    """
    path = Path(path)
    ranks = read_ranks(path)
    pattern, known = next((v for k, v in _KNOWN.items() if k in path.name), ("", {}))
    if split is not None:
        pattern, known = SPLITS[split], {}
    if not pattern:
        raise UserError(
            f"tokenizer.split: {path} does not say how text is split before merging, and its name "
            f"is none of the known ones ({', '.join(_KNOWN)}); name its splitting: "
            f"{', '.join(SPLITS)} (Llama 3: cl100k)"
        )
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _split_below(token, rank, ranks)
            if len(parts) != 2:
                raise DataError(f"{path}: token of rank {rank} is no merge of two lower ones")
            merges.append((spell(parts[0]), spell(parts[1])))
    vocab.update(known)
    free = max(vocab.values()) + 1
    for name in SPECIAL_TOKENS:
        if name not in vocab:
            vocab[name] = free
            free += 1
    # A piece that is a token as a whole is that token, as in tiktoken, without merging up to it.
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special(t) for t in dict.fromkeys((*known, *SPECIAL_TOKENS))])
    return FastTokenizer(backend, pad=PAD)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes to rank."""
    ranks: dict[bytes, int] = {}
    try:
        lines = safe_files.read_bytes(path).splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            if not 0 <= int(rank) < MAX_VOCABULARY:
                raise ValueError(f"rank {int(rank)} is out of range")
            if len(token) > _MAX_TOKEN:
                raise ValueError(f"a token of {len(token)} characters")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path}: line {number}: not 'base64 rank': {error}") from error
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing or len(set(ranks.values())) != len(ranks):
        what = f"byte {missing[0]} has no token" if missing else "a rank occurs twice"
        raise DataError(f"{path}: line {len(lines)}: not a whole tiktoken file: {what}")
    return ranks


def _split_below(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts that merges of a rank below ``limit`` leave of ``token``."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        joined = [ranks.get(a + b, limit) for a, b in itertools.pairwise(parts)]
        best = min(joined, default=limit)
        if best >= limit:
            return parts
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
