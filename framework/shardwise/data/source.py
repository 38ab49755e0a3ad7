"""One source of documents or conversations, as a config names it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import xxhash
from pydantic import Field, model_validator

from shardwise import hub
from shardwise.config.artifacts import ArtifactName
from shardwise.config.explain import nearest
from shardwise.config.schema import PositiveFloat, Section, beside, shown
from shardwise.data import files as data_files
from shardwise.data import folders, formats, readers, tables
from shardwise.data.readers import Document
from shardwise.data.stdlib import Split as StdlibSplit
from shardwise.data.stdlib import read_stdlib, stdlib_files
from shardwise.data.streams import MAX_EXPANSION, require_zstd, suffix_of
from shardwise.data.unused import Unused, say_once
from shardwise.errors import DataError, UserError

if TYPE_CHECKING:
    from shardwise.data.fast_tokenizer import Tokenizer

# Names of today and of before: which format, in files of which suffix, whatever they are called.
_IN_FILES_OF = {
    "jsonl": ("documents", ".jsonl"),
    "parquet": ("documents", ".parquet"),
    "chat-jsonl": ("messages", ".jsonl"),
    "preference-jsonl": ("preference", ".jsonl"),
}
# Suffixes that a kind's files cannot have; of the kinds not named here: parquet's and Arrow's.
_OTHERS = {"parquet": (".jsonl", ".json", ".txt", ".arrow")}
_told: dict[tuple[str, tuple[str, ...]], tuple[Any, DataSource]] = {}


class DataSource(Section):
    """One source of documents or conversations."""

    model_config = shown(kind="text", path="corpus/*.txt")

    kind: Literal[
        "auto",
        "stdlib",
        "text",
        "documents",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt-completion",
        "preference",
        "steps",
        "indexed",
        "jsonl",
        "parquet",
        "chat-jsonl",
        "preference-jsonl",
    ] = Field(
        "auto",
        description="format of its rows (data.formats); auto: told from the first rows, and said; "
        "default: auto, or stdlib without a path; jsonl, parquet: documents in such files; "
        "chat-jsonl: messages; preference-jsonl: preference",
    )
    path: Path | None = Field(
        None,
        description="file, folder (of datasets, too), glob or hf:org/name; indexed: the prefix; "
        "stdlib: another Lib folder",
        examples=["corpus/*.txt"],
    )
    from_: ArtifactName = None
    field: str | None = Field(
        None,
        description="the first of its columns; default: text, messages, ... by its kind",
        examples=["content"],
        json_schema_extra=beside(kind="documents"),
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our name of a column: its name in the rows",
        examples=[{"prompt": "question", "completion": "answer"}],
        json_schema_extra=beside(kind="prompt-completion"),
    )
    subset: str | None = Field(
        None,
        description="of a data set that has several",
        examples=["main"],
        json_schema_extra=beside(kind="messages"),
    )
    weight: PositiveFloat = Field(
        1.0, description="share of rows drawn, relative to the others", examples=[3.0]
    )
    split: str = Field(
        "train",
        description="stdlib: train, validation or all; a data set's: by its name",
        examples=["test"],
        json_schema_extra=beside(kind="messages"),
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

    @model_validator(mode="before")
    @classmethod
    def _kind_by_path(cls, data: Any) -> Any:
        if isinstance(data, dict) and not {"kind", "from"} & data.keys() and not data.get("path"):
            return {**data, "kind": "stdlib"}
        return data

    @model_validator(mode="after")
    def _keys_fit(self) -> DataSource:
        kind = self.kind
        if self.from_ is not None:
            if self.path is not None:
                self.refuse(("from",), "and path both say where its rows are; keep one")
            return self
        if self.path is None and kind != "stdlib":
            raise ValueError(f"a source of kind {kind} needs a path")
        undivided = kind in ("text", "indexed", *_IN_FILES_OF)
        if undivided and (self.split != "train" or self.subset is not None):
            raise ValueError(
                f"split {self.split} divides the standard library only, and data sets as datasets "
                f"and the hub have them; list the files of a {kind} source for validation under "
                "data.validation, or set data.held_out"
            )
        if kind == "stdlib" and self.split not in ("train", "validation", "all"):
            raise ValueError(f"split {self.split}: stdlib has train, validation and all")
        self._check_columns()
        return self

    def _check_columns(self) -> None:
        if not self.columns and self.field is None:
            return
        if self.kind == "auto":
            if self.field is not None:
                self.refuse(("field",), "goes with a kind; write columns: {text: ...}")
            every = (c for form in formats.FORMATS.values() for c in form.columns)
            known = [*dict.fromkeys(every)]
        elif self.format not in formats.FORMATS or self.format == "text":
            if self.columns:
                self.refuse(("columns",), f"a source of kind {self.kind} has no columns")
            return
        else:
            known = [*formats.FORMATS[self.format].columns]
        for ours, theirs in self.columns.items():
            if ours not in known:
                self.refuse(
                    ("columns", ours),
                    f"no column of ours{nearest(ours, known)}; known: {', '.join(known)}",
                )
            if list(self.columns.values()).count(theirs) > 1:
                self.refuse(("columns", ours), f"{theirs} is given two names; keep one")
        if self.field is not None and self.main in self.columns:
            self.refuse(("field",), f"and columns.{self.main} say the same; keep one")

    @property
    def format(self) -> str:
        """What its rows are, a key of `formats.FORMATS` (auto, stdlib, indexed: have none)."""
        return _IN_FILES_OF.get(self.kind, (self.kind, ""))[0]

    @property
    def main(self) -> str:
        """The first column of its format."""
        return formats.FORMATS[self.format].needed[0][0]

    def told(self, among: Sequence[str]) -> DataSource:
        """The same with its kind, where that is auto: detected among these formats, said once."""
        if self.kind != "auto" or self.path is None:
            return self
        key = (self.model_dump_json(), tuple(among))
        if key in _told and _told[key][0] == _stamps(_told[key][1].files()):
            return _told[key][1]
        found = formats.detect(
            self.path,
            among,
            columns=self.columns,
            split=self.split,
            subset=self.subset,
            max_expansion=self.max_expansion,
        )
        updates = {"kind": found.format, "columns": {**found.columns, **self.columns}}
        source = self.model_copy(update=updates)
        say_once(found.describe(self.path, found.num_rows(self.max_expansion)))
        _told[key] = _stamps(source.files()), source
        return source

    @property
    def label(self) -> str:
        """For messages and reports."""
        return f"{self.kind}:{self.path or self.from_ or self.split}"

    def files(self) -> list[Path]:
        """The files that hold this source, in order; DataError when there is none."""
        if self.kind == "stdlib":
            return stdlib_files(cast(StdlibSplit, self.split), self.path, self.exclude)
        if self.path is None:
            raise DataError(f"{self.from_}: an earlier job is still to write it")
        if self.kind == "indexed":
            from shardwise.data.indexed import store_paths  # numpy, which a recipe does not need

            return list(store_paths(self.path))
        if self.kind == "text" or self.kind in _IN_FILES_OF:
            suffixes = tuple(filter(None, [_IN_FILES_OF.get(self.kind, ("", ""))[1]]))
            found = data_files.find_files(hub.local_folder(self.path, kind="dataset"), suffixes)
        else:
            found = folders.row_files(self.path, self.split, self.subset)
        kept = [f for f in found if not any(f.match(p) for p in self.exclude)]
        if not kept:
            raise DataError(f"{self.path}: exclude leaves none of its {len(found)} files")
        return kept

    def check(self, among: Sequence[str]) -> None:
        """Raise DataError unless its files are there, of ``among``, and what reads them.

        A file whose suffix says that it is of another kind is refused too. Opens none, unless the
        format has to be told.
        """
        if self.path is None:  # the standard library's, or still to be written
            return
        source = self.told(among)
        for file in source.files():
            if not file.is_file():
                raise DataError(f"{file}: no such file")
            if file.suffix.lower() == ".zst":
                require_zstd(file)
            suffix = suffix_of(file)
            files_of = source.kind in ("text", *_IN_FILES_OF)
            if files_of and suffix in _OTHERS.get(source.kind, readers.TABLES):
                raise DataError(f"{file}: a {suffix} file is not of kind {source.kind}")
            if suffix in readers.TABLES:
                tables.require(file)

    def documents(
        self, strict: bool = False, tokenizer: Tokenizer | None = None
    ) -> Iterator[Document]:
        """Read the documents, in a fixed order; fields that nothing reads are named once.

        With ``strict`` they are an error. Conversations (of a kind that is named, never detected)
        are written out by the template of ``tokenizer``, or by ChatML.
        """
        if self.kind == "stdlib":
            return read_stdlib(cast(StdlibSplit, self.split), self.path, self.exclude)
        source = self.told(formats.DOCUMENTS)
        if source.kind == "text":
            return readers.read_text(source.files(), self.max_expansion)
        if source.format == "documents":
            return source._documents(Unused(source.label, strict, self.ignore))
        if source.format in formats.CONVERSATIONS:
            from shardwise.data.written import written  # numpy, which a recipe does not need

            unused = Unused(source.label, strict, self.ignore)
            return written(source.format, source.rows(), unused, tokenizer)
        raise UserError(f"{self.label}: holds no plain documents")

    def _documents(self, unused: Unused) -> Iterator[Document]:
        field = self.field or self.columns.get("text", "text")
        suffix = _IN_FILES_OF.get(self.kind, ("", ""))[1]
        yield from readers.read_documents(self.files(), field, self.max_expansion, unused, suffix)
        unused.say()

    def rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, object) of each row, under our names, without what is ignored; `told` before."""
        suffix = _IN_FILES_OF.get(self.kind, ("", ""))[1]
        rows = readers.read_rows(self.files(), self.max_expansion, suffix)
        columns = self.columns | ({} if self.field is None else {self.main: self.field})
        assert self.path is not None
        return formats.Renaming(self.path, self.format, columns, self.ignore).rows(rows)

    def fingerprint(self) -> str:
        """Hash of the contents: of every file, or what an indexed store's manifest recorded."""
        if self.kind == "indexed":
            from shardwise.data.indexed import read_manifest

            assert self.path is not None
            manifest = read_manifest(self.path)
            if manifest is not None:
                return str(manifest["content_hash"])
        source = self.told(formats.DOCUMENTS)
        how = f"{source.kind}|{source.field}|"
        if source.columns:
            how += f"{sorted(source.columns.items())}|"
        return xxhash.xxh3_128_hexdigest((how + data_files.fingerprint(source.files())).encode())


def _stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What tells that files have changed, without reading them."""
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
