"""`shardwise data prepare` and `shardwise data inspect`: write a token store, and look into one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from shardwise.data import left_out
from shardwise.data.indexed import (
    IndexedStore,
    IndexedWriter,
    manifest_path,
    read_manifest,
    store_paths,
    token_dtype,
)
from shardwise.data.readers import Document
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import DataError
from shardwise.storage.durable import sync_tree

Progress = Callable[["PrepareReport"], None]
_NO_ID = 1 << 31  # from here on: no vocabulary is that large
_BATCH_CHARACTERS = 1 << 20  # text handed to the tokenizer at once


@dataclasses.dataclass(frozen=True)
class PrepareReport:
    """What was written (so far, when given to a progress callback)."""

    prefix: Path
    num_documents: int
    num_tokens: int
    num_bytes: int  # UTF-8 bytes of text

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for, end tokens counted."""
        return self.num_bytes / max(self.num_tokens, 1)


def prepare(
    sources: Iterable[DataSource],
    tokenizer: Tokenizer,
    prefix: Path | str,
    progress: Progress | None = None,
) -> PrepareReport:
    """Tokenise the documents of ``sources`` in turn into ``<prefix>.bin`` and ``.idx``.

    Each document ends with EOS. Beside the store go ``<prefix>.store.json`` (counts and hashes)
    and ``<prefix>.tokenizer/``, so that it explains itself. After an error nothing of the new store
    is left. Raises DataError for unreadable or empty input, and for input that would be written
    over.
    """
    sources = list(sources)
    _refuse_own_output(sources, prefix)
    documents = itertools.chain.from_iterable(s.documents(tokenizer=tokenizer) for s in sources)
    report = write_store(documents, tokenizer, prefix, progress=progress)
    tokenizer.save(tokenizer_folder(prefix))
    sync_tree(tokenizer_folder(prefix))
    return report


def _refuse_own_output(sources: Iterable[DataSource], prefix: Path | str) -> None:
    outputs = {*store_paths(prefix), manifest_path(prefix), tokenizer_folder(prefix)}
    written = {path.resolve() for path in outputs}
    for source in sources:
        for file in source.files():
            whole = file.resolve()
            if written & {whole, *whole.parents}:
                raise DataError(
                    f"{file}: is an input and would be written over; name another store than "
                    f"{store_paths(prefix)[0].with_suffix('')}, or narrow the input"
                )


def write_store(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    prefix: Path | str,
    *,
    content_hash: str | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """`prepare` without the tokenizer's folder.

    ``content_hash`` is recorded in the manifest; None: the hash of tokenizer and texts.
    """
    prefix = store_paths(prefix)[0].with_suffix("")
    digest = xxhash.xxh3_128(tokenizer.hash.encode())
    num_bytes = 0
    writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size))
    with left_out.scope() as found, writer:
        for batch in _batches(documents):
            for document, ids in zip(batch, _encoded(batch, tokenizer)):
                writer.add(np.append(np.asarray(ids, dtype=np.int64), tokenizer.eos_id))
                raw = document.raw
                num_bytes += len(raw)
                digest.update(len(raw).to_bytes(8, "little") + raw)
            if progress is not None:
                progress(_report(prefix, writer, num_bytes))
        writer.manifest = {
            "content_hash": content_hash or digest.hexdigest(),
            "tokenizer_hash": tokenizer.hash,
            "eos_id": tokenizer.eos_id,
            "num_documents": writer.num_documents,
            "num_tokens": writer.num_tokens,
            "num_bytes": num_bytes,
            **({"left_out": found.as_json()} if found.all() else {}),
        }
    return _report(prefix, writer, num_bytes)


def _encoded(batch: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    if not any(d.special for d in batch):
        return tokenizer.encode_batch([d.text for d in batch])
    return [tokenizer.encode(d.text, allow_special=d.special) for d in batch]


def _report(prefix: Path, writer: IndexedWriter, num_bytes: int) -> PrepareReport:
    return PrepareReport(prefix, writer.num_documents, writer.num_tokens, num_bytes)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenizer_folder(prefix: Path | str) -> Path:
    """Where `prepare` keeps the tokenizer of a store."""
    return store_paths(prefix)[0].with_suffix(".tokenizer")


@dataclasses.dataclass(frozen=True)
class Sample:
    """The beginning of one document; ``text`` None when no tokenizer is known."""

    document: int
    ids: list[int]
    text: str | None


@dataclasses.dataclass(frozen=True)
class StoreReport:
    """What `inspect` found. Lengths are in tokens; a histogram bin is [low, high)."""

    prefix: Path
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int | None  # of the original text, if the manifest knows
    smallest_id: int
    largest_id: int
    length_mean: float
    length_percentiles: dict[str, float]
    length_histogram: list[tuple[int, int, int]]  # low, high, documents
    samples: list[Sample]
    manifest: dict[str, Any] | None


def inspect(
    path: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    num_samples: int = 3,
    sample_tokens: int = 64,
) -> StoreReport:
    """Look into a token store, ours or Megatron's, given its prefix or either file.

    The first documents are decoded by ``tokenizer``, or by the one that `prepare` left beside the
    store. Raises DataError, naming file and offset, for a store that is damaged.
    """
    prefix = store_paths(path)[0].with_suffix("")
    store = IndexedStore(prefix)
    if tokenizer is None and tokenizer_folder(prefix).is_dir():
        tokenizer = load_tokenizer(tokenizer_folder(prefix))
    smallest, largest = int(store.tokens.min()), int(store.tokens.max())
    if smallest < 0 or largest >= _NO_ID:
        bad = int((store.tokens.argmin if smallest < 0 else store.tokens.argmax)())
        raise DataError(
            f"{store.bin_path}: byte {bad * store.dtype.itemsize}: {store.tokens[bad]} is no "
            "token id; the file is damaged, or of another index"
        )
    lengths = store.lengths
    manifest = read_manifest(prefix)
    samples = []
    for i in range(min(num_samples, len(store))):
        ids = store[i][:sample_tokens].tolist()
        samples.append(Sample(i, ids, None if tokenizer is None else tokenizer.decode(ids)))
    return StoreReport(
        prefix=prefix,
        dtype=store.dtype.name,
        num_documents=len(store),
        num_tokens=int(store.tokens.size),
        num_bytes=None if manifest is None else int(manifest["num_bytes"]),
        smallest_id=smallest,
        largest_id=largest,
        length_mean=float(lengths.mean()),
        length_percentiles={
            f"p{p}": float(np.percentile(lengths, p)) for p in (0, 50, 90, 99, 100)
        },
        length_histogram=_histogram(lengths),
        samples=samples,
        manifest=manifest,
    )


def _histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Documents by length, in bins that double: [0, 1), [1, 2), [2, 4), ..."""
    num_bins = int(lengths.max()).bit_length() + 1
    edges = [0, *(1 << i for i in range(num_bins))]
    counts = np.diff(np.searchsorted(np.sort(lengths), edges))
    return [(low, high, int(n)) for low, high, n in zip(edges, edges[1:], counts)]
