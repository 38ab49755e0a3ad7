"""The datasets that a config describes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import heapq
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shardwise.data import left_out, parts
from shardwise.data.chat import check_use, encode_chat
from shardwise.data.config import ChatDataConfig, DataConfig, Texts, Turns
from shardwise.data.conversation import (
    Conversation,
    read_conversation,
    refuse_fields,
    take_variables,
)
from shardwise.data.conversions import as_conversation
from shardwise.data.formats import CONVERSATIONS
from shardwise.data.indexed import IndexedStore, manifest_path, read_manifest, store_paths
from shardwise.data.mixture import MixtureSampler
from shardwise.data.packing import Example, PackedExamples, PackedRows, Row
from shardwise.data.parts import WHOLE, Part
from shardwise.data.preferences import encode_raw
from shardwise.data.prepare import Progress, write_store
from shardwise.data.readers import Document
from shardwise.data.sampler import Sampler
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.data.unused import Unused
from shardwise.errors import DataError, UserError

log = logging.getLogger(__name__)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: by its content, so copies go together."""
    return parts.is_held_out(document.raw, fraction)


def _chosen(
    config: DataConfig, source: DataSource, validation: bool, tokenizer: Tokenizer | None = None
) -> Iterator[Document]:
    for document in source.documents(config.strict_fields, tokenizer):
        if not config.held_out or is_held_out(document, config.held_out) == validation:
            yield document


def training_texts(config: DataConfig, num_bytes: int, seed: int = 0) -> Iterator[str]:
    """About ``num_bytes`` of training text for a tokenizer, in a shuffled, reproducible order.

    Sources share the budget by weight. Each is read once in full, keeping the documents with the
    lowest hash of (seed, name), so that no corner of it is favoured.
    """
    sources = [s for s in config.sources if s.kind != "indexed"]
    if not sources:
        raise DataError("an indexed source holds no text to train a tokenizer on; give one of text")
    total = sum(s.weight for s in sources)
    for source in sources:
        budget = num_bytes * source.weight / total
        kept: list[tuple[int, str, Document]] = []  # a heap, the highest hash on top
        size = 0
        for document in _chosen(config, source, validation=False):
            key = xxhash.xxh3_64_intdigest(f"{seed}|{document.name}".encode())
            heapq.heappush(kept, (-key, document.name, document))
            size += len(document.raw)
            while size - len(kept[0][2].raw) >= budget:
                size -= len(heapq.heappop(kept)[2].raw)
        for _, _, document in sorted(kept, key=lambda entry: (-entry[0], entry[1])):
            yield document.text


@dataclasses.dataclass(frozen=True)
class ValidationSet:
    """Validation documents, as rows in order and as raw bytes.

    ``num_bytes``: UTF-8 bytes of all documents; bits per byte is the summed loss over all valid
    targets (each document's EOS included, as a compressor, too, must say where it ends), in bits,
    over ``num_bytes``.
    """

    rows: PackedRows
    num_bytes: int
    num_documents: int
    hash: str
    _read: Callable[[], Iterator[Document]]

    @property
    def num_rows(self) -> int:
        """Rows of ``seq_len`` pairs."""
        return self.rows.num_rows

    def row(self, index: int) -> Row:
        """One row, in document order."""
        return self.rows.row(index)

    def documents(self) -> Iterator[Document]:
        """The documents again, read from their source."""
        return self._read()


class PretrainDataset:
    """Packed rows of one or several sources, numbered through; see `build_pretrain_dataset`."""

    def __init__(
        self,
        parts: Sequence[PackedRows],
        weights: Sequence[float],
        seed: int,
        data_hash: str,
        validation: ValidationSet | None,
    ) -> None:
        self.parts, self.weights, self.seed = list(parts), list(weights), seed
        self.hash, self.validation = data_hash, validation
        self._offsets = np.cumsum([0, *(p.num_rows for p in parts)])
        self.num_rows = int(self._offsets[-1])
        self.num_tokens = sum(p.num_tokens for p in parts)

    def __len__(self) -> int:
        return self.num_rows

    def row(self, index: int) -> Row:
        """Row ``index`` of the concatenated sources."""
        part, inside = self._place(index)
        return part.row(inside)

    def num_pairs(self, index: int) -> int:
        """Pairs of row ``index``, padding left out."""
        part, inside = self._place(index)
        return part.num_pairs(inside)

    def _place(self, index: int) -> tuple[PackedRows, int]:
        part = int(np.searchsorted(self._offsets, index, side="right")) - 1
        return self.parts[part], index - int(self._offsets[part])

    def sampler(self, name: str = "pretrain") -> Sampler | MixtureSampler:
        """The endless order of row indices: ``.batch(position, size)``."""
        if len(self.parts) == 1:
            return Sampler(self.num_rows, self.seed, name)
        sizes = [p.num_rows for p in self.parts]
        return MixtureSampler(sizes, self.weights, self.seed, name)


def build_pretrain_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    seed: int,
    cache_dir: Path | str,
    progress: Progress | None = None,
) -> PretrainDataset:
    """Tokenise (once) and open the training and validation documents.

    Token stores are kept in ``cache_dir`` under the hash of content and tokenizer. Any number of
    processes may call this at once: one builds, the others wait for it. ``hash`` of the result
    covers contents, tokenizer, weights, held-out share and ``seq_len``. Raises DataError or
    UserError for input that is missing, empty or unreadable.
    """
    cache = Path(cache_dir)
    opened = [_open_source(config, [s], False, tokenizer, cache, progress) for s in config.sources]
    parts = [_rows(store, tokenizer, seq_len) for store, _, _ in opened]
    validation = build_validation(config, tokenizer, seq_len, cache, progress)
    weights = [s.weight for s in config.sources]
    said = json.dumps([[key for _, _, key in opened], weights, seq_len, tokenizer.hash])
    data_hash = xxhash.xxh3_128_hexdigest(said.encode())
    return PretrainDataset(parts, weights, seed, data_hash, validation)


def build_validation(
    config: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    cache_dir: Path | str,
    progress: Progress | None = None,
) -> ValidationSet | None:
    """The validation part of `build_pretrain_dataset` alone; None when the config names none."""
    sources = config.validation_sources()
    if not sources:
        return None
    store, num_bytes, key = _open_source(
        config, sources, True, tokenizer, Path(cache_dir), progress
    )

    def read() -> Iterator[Document]:
        return _read_all(config, sources, tokenizer)

    return ValidationSet(_rows(store, tokenizer, seq_len), num_bytes, len(store), key, read)


def _rows(store: IndexedStore, tokenizer: Tokenizer, seq_len: int) -> PackedRows:
    start_id = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return PackedRows.from_store(store, seq_len, start_id, tokenizer.pad_id)


def _read_all(
    config: DataConfig, sources: Sequence[DataSource], tokenizer: Tokenizer
) -> Iterator[Document]:
    """Validation documents again; those of an indexed source are decoded from their tokens."""
    for source in sources:
        if source.kind != "indexed":
            yield from _chosen(config, source, True, tokenizer)
            continue
        store = IndexedStore(source.path or "")
        for i in range(len(store)):
            yield Document(f"{source.path}:{i}", tokenizer.decode(store[i].tolist()))


def _open_source(
    config: DataConfig,
    sources: Sequence[DataSource],
    validation: bool,
    tokenizer: Tokenizer,
    cache: Path,
    progress: Progress | None,
) -> tuple[IndexedStore, int, str]:
    """(store, UTF-8 bytes of its documents, hash of its content) of one or more sources."""
    if any(s.kind == "indexed" for s in sources):
        if len(sources) > 1:
            raise UserError("an indexed validation source must be the only one")
        return _open_indexed(sources[0], tokenizer)
    share = config.held_out
    said = ["1", validation and share, share, *(s.fingerprint() for s in sources), tokenizer.hash]
    key = xxhash.xxh3_128_hexdigest(json.dumps(said).encode())
    prefix = cache / key

    def documents() -> Iterator[Document]:
        found = False
        for source in sources:
            for document in _chosen(config, source, validation, tokenizer):
                found = True
                yield document
        if not found:
            part = "validation" if validation else "training"
            labels = ", ".join(s.label for s in sources)
            raise DataError(f"{labels}: no document is left for {part} (held_out {share})")

    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{key}.lock"):
        store = _open_cached(prefix)
        if store is None:
            write_store(documents(), tokenizer, prefix, content_hash=key, progress=progress)
            store = IndexedStore(prefix)
        manifest = read_manifest(prefix)
        assert manifest is not None
        left_out.tell(manifest.get("left_out", []))
    return store, int(manifest["num_bytes"]), key


def _open_cached(prefix: Path) -> IndexedStore | None:
    """The store that was made before; None if it is missing, damaged or without hashes."""
    try:
        manifest = read_manifest(prefix)
        if manifest is not None and "files" in manifest:
            return IndexedStore(prefix)
    except DataError as error:
        log.warning("%s: made again from its source", error)
        for path in (manifest_path(prefix), *store_paths(prefix)):
            path.unlink(missing_ok=True)
    return None


def _open_indexed(source: DataSource, tokenizer: Tokenizer) -> tuple[IndexedStore, int, str]:
    assert source.path is not None
    store = IndexedStore(source.path)
    ends = store.tokens[store.starts[1:][store.lengths > 0] - 1]
    open_ended = int((ends != tokenizer.eos_id).sum())
    if open_ended:
        log.warning(
            "%s: %d of %d documents do not end with the end token %d, so the model will not learn "
            "to stop there; tokenise again with an end-of-document token",
            source.label, open_ended, len(store), tokenizer.eos_id,
        )  # fmt: skip
    num_bytes, block = 0, 1 << 24
    for i in range(0, store.tokens.size, block):
        ids = store.tokens[i : i + block]
        if int(ids.max()) >= tokenizer.vocab_size or int(ids.min()) < 0:
            raise DataError(
                f"{store.bin_path}: byte {i * store.dtype.itemsize}: ids up to {ids.max()} after "
                f"here, but the tokenizer has {tokenizer.vocab_size}; it is another tokenizer's"
            )
        num_bytes += int(tokenizer.byte_lengths[ids].sum())
    return store, num_bytes, source.fingerprint()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, which the system frees when its holder dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build_chat_examples(
    sources: Iterable[DataSource],
    tokenizer: Tokenizer,
    turns: Turns = "together",
    strict: bool = False,
    texts: Texts = "chat",
    part: Part = WHOLE,
) -> list[Example]:
    """Conversations of sources as (ids, loss_mask, where).

    Every DataError names file and row. Fields that nothing reads are named once, or with
    ``strict`` refused. ``texts``: see `ChatDataConfig`. ``part``: of the rows, by what is asked.
    """
    how = tokenizer, turns, strict, texts, part
    return [example for source in sources for example in chat_examples(source, *how)]


def chat_examples(
    given: DataSource,
    tokenizer: Tokenizer,
    turns: Turns = "together",
    strict: bool = False,
    texts: Texts = "chat",
    part: Part = WHOLE,
) -> Iterator[Example]:
    """`build_chat_examples` of one source, row by row."""
    source = given.told(CONVERSATIONS)
    unused = Unused(source.label, strict, source.ignore)
    for where, row in source.rows():
        try:
            if texts == "raw" and source.format == "prompt-completion" and _is_plain(row):
                if not part.has(row["prompt"]):
                    continue
                found, rest = _raw(row, tokenizer, where)
            else:
                said = read_conversation(as_conversation(source.format, row))
                if not part.has(_asked(said)):
                    continue
                redundant = check_use(tokenizer, said.messages, said.variables)
                found = list(_examples(said, tokenizer, turns, where))
                rest = [*said.unused, *redundant]
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        unused.add(where, rest)
        if not any(any(example.loss_mask) for example in found):
            raise DataError(f"{where}: the conversation has no assistant turn to learn")
        yield from found
    unused.say()


def _asked(said: Conversation) -> list[dict[str, Any]]:
    """The messages before the first that is learned."""
    return said.messages[: said.learn.index(True)] if True in said.learn else said.messages


def _is_plain(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)


def _raw(
    row: Mapping[str, Any], tokenizer: Tokenizer, where: str
) -> tuple[list[Example], list[str]]:
    """A prompt and its completion as they stand, with EOS; and the fields that nothing reads."""
    said = {k: v for k, v in row.items() if v not in (None, [], {})}
    prompt, completion = said.pop("prompt"), said.pop("completion")
    if take_variables(said):
        raise DataError("texts that stand as they are have no template to take more than them")
    refuse_fields(said)
    found = encode_raw(tokenizer, prompt, [completion], [1.0])
    [answer] = found.answers
    mask = [False] * len(found.prompt) + [True] * len(answer)
    return [Example([*found.prompt, *answer], mask, where)], sorted(said)


def _examples(
    said: Conversation, tokenizer: Tokenizer, turns: Turns, where: str
) -> Iterator[Example]:
    if turns == "together":
        found = encode_chat(tokenizer, said.messages, learn=said.learn, **said.variables)
        yield Example(*found, where)
        return
    for i, learned in enumerate(said.learn):
        if learned:
            learn = [False] * i + [True]
            found = encode_chat(tokenizer, said.messages[: i + 1], learn=learn, **said.variables)
            yield Example(*found, where)


def pack_examples(
    examples: Sequence[Example], config: ChatDataConfig, seq_len: int, pad_id: int
) -> PackedExamples:
    """Examples as rows, by the config's policy."""
    return PackedExamples(examples, seq_len, pad_id, too_long=config.too_long, pack=config.pack)
