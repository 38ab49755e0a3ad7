"""One source of documents or conversations, as a config names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import Field, model_validator

from shardwise.config.schema import PositiveFloat, Section, beside, shown
from shardwise.data import files as data_files
from shardwise.data import readers
from shardwise.data.readers import Document
from shardwise.data.stdlib import read_stdlib, stdlib_files
from shardwise.data.streams import MAX_EXPANSION, require_zstd, suffix_of
from shardwise.data.unused import Unused
from shardwise.errors import DataError, UserError

_SUFFIXES = {"text": (), "jsonl": (".jsonl",), "parquet": (".parquet",)}
_SUFFIXES |= dict.fromkeys(("chat-jsonl", "preference-jsonl"), (".jsonl",))
# Suffixes that a kind's files cannot have; of the kinds not named here: parquet's.
_OTHERS = {"parquet": (".jsonl", ".json", ".txt")}


class DataSource(Section):
    """One source of documents or conversations."""

    model_config = shown(kind="text", path="corpus/*.txt")

    kind: Literal[
        "stdlib", "text", "jsonl", "parquet", "indexed", "chat-jsonl", "preference-jsonl"
    ] = Field("stdlib", description="how its files are read")
    path: Path | None = Field(
        None,
        description="file, folder or glob; indexed: the prefix; stdlib: another Lib folder",
        examples=["corpus/*.txt"],
    )
    field: str | None = Field(
        None, description="default: text, or messages for chat-jsonl", examples=["content"]
    )
    weight: PositiveFloat = Field(
        1.0, description="share of rows drawn, relative to the others", examples=[3.0]
    )
    split: Literal["train", "validation", "all"] = Field(
        "train", description="stdlib only", json_schema_extra=beside(kind="stdlib")
    )
    exclude: list[str] = Field(
        default_factory=list,
        description="name patterns of files to leave out (stdlib: before its split is drawn)",
        examples=[["test_*"]],
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="fields of its rows that are knowingly not read",
        examples=[["url"]],
    )
    max_expansion: PositiveFloat = Field(
        MAX_EXPANSION, description="what a compressed file may expand to, times its size"
    )

    @model_validator(mode="after")
    def _path_given(self) -> DataSource:
        if self.path is None and self.kind != "stdlib":
            raise ValueError(f"a source of kind {self.kind} needs a path")
        if self.split != "train" and self.kind != "stdlib":
            raise ValueError(
                f"split {self.split} divides the standard library only; list the files of a "
                f"{self.kind} source for validation under data.validation, or set data.held_out"
            )
        if self.weight != 1.0 and self.kind in ("chat-jsonl", "preference-jsonl"):
            raise ValueError(
                f"weight {self.weight:g}: {self.kind} sources are read whole and shuffled "
                "together, so they have no weight; leave it out, or repeat lines in the file"
            )
        return self

    @property
    def label(self) -> str:
        """For messages and reports."""
        return f"{self.kind}:{self.path}" if self.path else f"{self.kind}:{self.split}"

    def files(self) -> list[Path]:
        """The files that hold this source, in order; DataError when there is none."""
        if self.kind == "stdlib":
            return stdlib_files(self.split, self.path, self.exclude)
        assert self.path is not None
        if self.kind == "indexed":
            from shardwise.data.indexed import store_paths  # numpy, which a recipe does not need

            return list(store_paths(self.path))
        found = data_files.find_files(self.path, _SUFFIXES[self.kind])
        kept = [f for f in found if not any(f.match(p) for p in self.exclude)]
        if not kept:
            raise DataError(f"{self.path}: exclude leaves none of its {len(found)} files")
        return kept

    def check(self) -> None:
        """Raise DataError unless its files are there, and what reads them; opens none.

        A file whose suffix says that it is of another kind is refused too.
        """
        if self.kind == "stdlib" and self.path is None:
            return
        for file in self.files():
            if not file.is_file():
                raise DataError(f"{file}: no such file")
            if file.suffix.lower() == ".zst":
                require_zstd(file)
            suffix = suffix_of(file)
            if suffix in _OTHERS.get(self.kind, (".parquet",)):
                raise DataError(f"{file}: a {suffix} file is not of kind {self.kind}")
        if self.kind == "parquet":
            readers.require_parquet()

    def documents(self, strict: bool = False) -> Iterator[Document]:
        """Read the documents, in a fixed order; fields that nothing reads are named once.

        With ``strict`` they are an error.
        """
        if self.kind == "stdlib":
            return read_stdlib(self.split, self.path, self.exclude)
        if self.kind == "text":
            return readers.read_text(self.files(), self.max_expansion)
        if self.kind in ("jsonl", "parquet"):
            return self._documents(Unused(self.label, strict, self.ignore))
        raise UserError(f"{self.label}: holds no plain documents")

    def _documents(self, unused: Unused) -> Iterator[Document]:
        files, field = self.files(), self.field or "text"
        if self.kind == "jsonl":
            yield from readers.read_jsonl(files, field, self.max_expansion, unused)
        else:
            yield from readers.read_parquet(files, field, unused)
        unused.say()

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, object) of each row of a source of JSON lines."""
        return readers.read_json_rows(self.files(), self.max_expansion)

    def fingerprint(self) -> str:
        """Hash of the contents: of every file, or what an indexed store's manifest recorded."""
        if self.kind == "indexed":
            from shardwise.data.indexed import read_manifest

            assert self.path is not None
            manifest = read_manifest(self.path)
            if manifest is not None:
                return str(manifest["content_hash"])
        how = f"{self.kind}|{self.field}|"
        return xxhash.xxh3_128_hexdigest((how + data_files.fingerprint(self.files())).encode())
