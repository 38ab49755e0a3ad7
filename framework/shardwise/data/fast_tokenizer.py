"""Tokenizers behind one small protocol: plain bytes, BPE trained here, and files of other makers.

Everything that can be expressed as a ``tokenizer.json`` is one class, `FastTokenizer`, so that what
we train on is by construction what ``transformers.AutoTokenizer`` loads after `save`. That includes
the byte tokenizer (a byte-level BPE without merges), tiktoken files (`tiktoken_file`) and
sentencepiece models (`sentencepiece_model`).

Text never turns into control tokens by itself: ``encode`` spells "<|im_end|>" out as ordinary text
unless the caller asks for ``allow_special=True``, as chat rendering does for the template's parts.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xxhash
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from shardwise import integrity
from shardwise.data import guard
from shardwise.errors import DataError, UserError
from shardwise.models import travel

log = logging.getLogger(__name__)

EOS, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (EOS, IM_START, IM_END, PAD)

# Tokens after which an assistant's turn is over, in the templates of the common model families.
END_OF_TURN = (IM_END, "<|eot_id|>", "<|end|>", "<end_of_turn>", "</s>", "<|end_of_text|>", EOS)

# A line break takes the indentation after it (source code is full of both: this saves 4 % of the
# tokens against GPT-2's pattern with single digits), a word takes the one sign or space before it,
# digits come one by one (small models calculate better that way).
SPLIT_PATTERN = r"[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[ \t]+(?=\S)|\s+"

MAX_VOCABULARY = 2**24  # as `config.schema` bounds it: tables of this many rows are made


def is_library_error(error: BaseException) -> bool:
    """Whether the tokenizers library may raise this for a damaged file: a bare Exception, or the
    panic of its Rust code, which is none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# Patterns that take time in proportion to the text, whatever it is.
_HARMLESS = frozenset({SPLIT_PATTERN, " {2,}"})


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of shardwise asks of a tokenizer. Ids are Python ints in [0, vocab_size)."""

    chat_template: str | None

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def named_ids(self) -> dict[str, int]: ...
    @property
    def byte_lengths(self) -> NDArray[np.int64]: ...
    @property
    def hash(self) -> str: ...
    @property
    def special_tokens(self) -> tuple[str, ...]: ...
    @property
    def control_ids(self) -> frozenset[int]: ...
    @property
    def special_tokens_map(self) -> dict[str, str]: ...
    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]: ...
    def encode(self, text: str, *, allow_special: bool = False) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str: ...
    def id_of(self, token: str) -> int: ...
    def token_of(self, token_id: int) -> str: ...
    def files(self) -> dict[str, bytes]: ...
    def save(self, folder: Path | str, also: Mapping[str, bytes] | None = None) -> None: ...


class FastTokenizer:
    """A ``tokenizers.Tokenizer`` with the names of its end, begin and padding tokens.

    ``eos``, ``bos`` and ``pad`` are token strings; ``pad`` None pads with ``eos``. ``files`` are
    those it was read from, which `save` writes again as they are; ``ends`` are further ids that end
    a turn. Raises DataError when a token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos: str = EOS,
        bos: str | None = None,
        pad: str | None = None,
        chat_template: str | None = None,
        files: Mapping[str, bytes] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= largest < MAX_VOCABULARY:
            raise DataError(f"the tokenizer has the id {largest}; ids go up to {MAX_VOCABULARY}")
        self._parsing = backend  # recognises control tokens inside text
        text = backend.to_str()
        self._bounded = guard.needs_bound(text, _HARMLESS)
        self._plain = Backend.from_str(text)
        self._plain.encode_special_tokens = True  # spells them out
        self.chat_template = self._read_template = chat_template
        self._files = dict(files or {})
        self._eos, self._bos, self._pad = eos, bos, pad
        self.eos_id = self.id_of(eos)
        self.bos_id = None if bos is None else self.id_of(bos)
        self.pad_id = self.eos_id if pad is None else self.id_of(pad)
        self._ends = tuple(i for i in ends if i < self.vocab_size)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id (some vocabularies have holes)."""
        return int(max(self._parsing.get_vocab(with_added_tokens=True).values())) + 1

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The control tokens, by id."""
        added = self._parsing.get_added_tokens_decoder()
        return tuple(t.content for _, t in sorted(added.items()) if t.special)

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """The ids of `special_tokens`."""
        return frozenset(map(self.id_of, self.special_tokens))

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named tokens (``eos_token``, ...) as `save` writes them; chat templates get these."""
        found = self._config().items()
        return {k: v for k, v in found if k.endswith("_token") and isinstance(v, str)}

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn or a document; ``eos_id`` first."""
        known = [t for t in END_OF_TURN if t in self.special_tokens]
        return tuple(dict.fromkeys([self.eos_id, *map(self.id_of, known), *self._ends]))

    @property
    def named_ids(self) -> dict[str, int]:
        """Of "eos", "bos" and "pad", those that the tokenizer names itself."""
        named = {"eos": self._eos, "bos": self._bos, "pad": self._pad}
        return {kind: self.id_of(token) for kind, token in named.items() if token is not None}

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of ``text``; nothing is added to either end."""
        return list(self._encode(self._parsing if allow_special else self._plain, [text])[0].ids)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids, [start, end) of each in ``text``) with control tokens read as such."""
        found = self._encode(self._parsing, [text])[0]
        return list(found.ids), list(found.offsets)

    def _encode(self, backend: Backend, texts: list[str], batch: str = "encode_batch") -> list[Any]:
        """Encodings of ``texts``; in a bounded time, unless the patterns are known.

        Raises DataError for half a surrogate pair, and for patterns that fail or do not end.
        """

        def work() -> list[Any]:
            if len(texts) == 1 and not self._bounded:
                return [backend.encode(texts[0], add_special_tokens=False)]
            return list(getattr(backend, batch)(texts, add_special_tokens=False))

        try:
            if not self._bounded:
                return work()
            return guard.bounded(work, f"a text of {sum(map(len, texts))} characters")
        except Exception as error:
            refuse_surrogates(texts)
            raise error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all the threads that the tokenizers library may use."""
        found = self._encode(self._plain, list(texts), "encode_batch_fast")
        return [list(e.ids) for e in found]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return str(self._parsing.decode([int(i) for i in ids], skip_special_tokens=skip_special))

    def id_of(self, token: str) -> int:
        """Id of one token; DataError when the vocabulary lacks it."""
        found = self._parsing.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r} ({self.vocab_size} tokens)")
        return int(found)

    def token_of(self, token_id: int) -> str:
        """The token string of one id."""
        token = self._parsing.id_to_token(int(token_id))
        if token is None:
            raise DataError(f"the tokenizer has no id {token_id} (size {self.vocab_size})")
        return str(token)

    @functools.cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """int64 [vocab_size]: UTF-8 bytes that each id stands for; 0 for control tokens.

        For a tokenizer whose ``decode(encode(text)) == text`` the lengths of ``encode(text)`` sum
        to the bytes of ``text`` exactly. (One that puts a space before the text counts that too.)
        """
        spec = json.loads(self._parsing.to_str())
        byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        added = self._parsing.get_added_tokens_decoder()
        for token, i in self._parsing.get_vocab(with_added_tokens=True).items():
            if i in added:
                lengths[i] = 0 if added[i].special else len(added[i].content.encode())
            elif byte_level:
                lengths[i] = len(token)  # one character of the byte alphabet is one byte
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").encode())
        return lengths

    @property
    def hash(self) -> str:
        """xxh3-128 of what decides the ids of a text and of a conversation."""
        said = {"pad_token": self.token_of(self.pad_id), **self._config()}
        return fingerprint_of(self._parsing.to_str(), said)

    def save(self, folder: Path | str, also: Mapping[str, bytes] | None = None) -> None:
        """Write `files`, and ``also`` over them, with what they hash to."""
        files = self.files() | dict(also or {})
        travel.write(Path(folder), files)
        integrity.write_sums(Path(folder), files)

    def files(self) -> dict[str, bytes]:
        """What transformers' AutoTokenizer reads (`models.travel`), by name."""
        files = dict(self._files)
        config = travel.parse(files, travel.TOKENIZER_CONFIG)
        if travel.TOKENIZER not in files:
            files[travel.TOKENIZER] = self._parsing.to_str(pretty=True).encode()
            files[travel.TOKENIZER_CONFIG] = travel.dump(config | self._config())
        elif not config:
            files[travel.TOKENIZER_CONFIG] = travel.dump(self._config())
        if self.chat_template is not None and self.chat_template != self._read_template:
            files = travel.with_template(files, self.chat_template)
        if self._ends:
            files[travel.GENERATION] = travel.dump({"eos_token_id": list(self.stop_ids)})
        return files

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 10**30,
            "eos_token": self._eos,
        }
        if self._pad is not None:
            config["pad_token"] = self._pad
        if self._bos is not None:
            config["bos_token"] = self._bos
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config


class ByteTokenizer(FastTokenizer):
    """256 byte values, ids 0 to 255, and the special tokens after them. Needs no training."""

    def __init__(self, chat_template: str | None = None) -> None:
        vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
        backend = Backend(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([special(t) for t in SPECIAL_TOKENS])
        super().__init__(backend, pad=PAD, chat_template=chat_template)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The UTF-8 bytes of ``text`` (the same ids as the saved tokenizer.json, only faster)."""
        if allow_special:
            return super().encode(text, allow_special=True)
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError:
            refuse_surrogates([text])
            raise

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [self.encode(t) for t in texts]


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raise DataError for a text that holds half of a surrogate pair, which has no UTF-8."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"character {error.start} of {text[:40]!r}: a lone surrogate is no text"
            ) from error


def special(token: str) -> AddedToken:
    """A control token: matched literally, never split or stripped."""
    return AddedToken(token, special=True, normalized=False)


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that byte-level BPE uses for each byte, by byte value.

    Source: GPT-2 (Radford et al. 2019): bytes that print stand for themselves, the other 68 take
    the code points from 256 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(b) if b in printable else chr(next(others)) for b in range(256))


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    *,
    chat_template: str | None = None,
    pattern: str = SPLIT_PATTERN,
) -> FastTokenizer:
    """Byte-level BPE trained on ``texts``: the same texts in the same order give the same ids.

    ``vocab_size`` counts the 256 bytes and the special tokens, which take the lowest ids. Raises
    UserError when it cannot hold them, DataError when there is no text.
    """
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise UserError(f"tokenizer.vocab_size is {vocab_size}; bytes and specials need {least}")
    for needed in (EOS, PAD):
        if needed not in special_tokens:
            raise UserError(f"special_tokens must hold {needed!r}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special(t) for t in special_tokens],
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise DataError("there is no text to train a tokenizer on; check the data sources")
    size = backend.get_vocab_size()
    if size < vocab_size:
        log.warning(
            "the text gave a BPE of %d tokens, not %d: it repeats too little", size, vocab_size
        )
    return FastTokenizer(backend, pad=PAD, chat_template=chat_template)


def fingerprint_of(*parts: Any) -> str:
    """xxh3-128 of JSON values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
