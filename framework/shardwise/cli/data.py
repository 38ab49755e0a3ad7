"""`shardwise data prepare|inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwise.cli.output import JsonOption, NoVerify, emit, size
from shardwise.errors import UserError
from shardwise.terminal import one_line

if TYPE_CHECKING:
    from shardwise.data.source import DataSource
    from shardwise.data.tokenizer import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Make token stores, and look into them.")


@app.command()
def prepare(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Files or folders.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Prefix: writes OUT.bin and OUT.idx.")],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or a tokenizer.json, a folder that has one, a .model.")
    ] = "bytes",
    bpe: Annotated[
        int | None, typer.Option(help="Train a byte-level BPE of this size on the input instead.")
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            help="auto (by suffix), text, jsonl, parquet, documents (rows of any kind of file), or "
            "messages, sharegpt, ...: conversations, written by the tokenizer's template."
        ),
    ] = "auto",
    field: Annotated[
        str | None, typer.Option(help="The text's key in jsonl and parquet; default: text.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """Tokenise text, jsonl or parquet into an indexed store (Megatron's .bin and .idx)."""
    from shardwise.data.prepare import prepare as run
    from shardwise.data.tokenizer import SPECIAL_TOKENS, train_bpe

    sources = [_source(path, kind, field) for path in inputs]
    made: Tokenizer
    if bpe is not None:
        if tokenizer != "bytes":
            raise UserError("--bpe trains a tokenizer and --tokenizer gives one; choose")
        if bpe < (least := 256 + len(SPECIAL_TOKENS)):
            raise UserError(f"--bpe {bpe}: bytes and control tokens alone need {least}")
        made = train_bpe((d.text for s in sources for d in s.documents()), bpe)
    else:
        made = _tokenizer(tokenizer)
    report = run(sources, made, out)
    text = (
        f"{report.prefix}.bin, .idx: {report.num_documents:,} documents, "
        f"{report.num_tokens:,} tokens, {report.bytes_per_token:.2f} bytes a token"
    )
    emit(report, text, json)


@app.command()
def inspect(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A token store (prefix, .bin or .idx), or rows: a file, a folder, hf:org/name.",
        ),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="To decode samples with, and to write rows; as for prepare."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents or rows to show.")] = 3,
    kind: Annotated[str, typer.Option(help="Rows: their format; auto: told from them.")] = "auto",
    column: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="Rows: a column's own name.")
    ] = None,
    split: Annotated[str, typer.Option(help="Rows: of a data set that has several.")] = "train",
    subset: Annotated[
        str | None, typer.Option(help="Rows: of a data set that has several.")
    ] = None,
    raw: Annotated[bool, typer.Option(help="Rows: plain texts without a template.")] = False,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """What a token store holds, or files of rows: their format, and rows as they are learned."""
    from shardwise.data.indexed import store_paths
    from shardwise.data.prepare import inspect as run

    if not any(file.exists() for file in store_paths(data)):
        chosen = {"kind": kind, "columns": _named(column or []), "split": split, "subset": subset}
        _look(data, tokenizer, {**chosen, "raw": raw, "num_samples": samples}, json)
        return
    found = run(data, _tokenizer(tokenizer) if tokenizer else None, num_samples=samples)
    lines = [
        f"{found.prefix}: {found.num_documents:,} documents, {found.num_tokens:,} tokens of "
        f"{found.dtype}, ids {found.smallest_id} to {found.largest_id}"
        + (f", {size(found.num_bytes)} of text" if found.num_bytes is not None else ""),
        f"tokens a document: mean {found.length_mean:.1f}, "
        + ", ".join(f"{name} {value:g}" for name, value in found.length_percentiles.items()),
    ]
    lines += [f"  {low:>9,} to {high:<9,} {num:>9,}" for low, high, num in found.length_histogram]
    lines += [
        f"document {s.document}: {one_line(s.text) if s.text is not None else s.ids!r}"
        for s in found.samples
    ]
    emit(found, "\n".join(lines), json)


def _look(path: Path, tokenizer: str | None, chosen: dict[str, Any], json: str | None) -> None:
    from shardwise.data.formats import FORMATS
    from shardwise.data.look import look

    if chosen["kind"] not in ("auto", *FORMATS):
        raise UserError(f"--kind {chosen['kind']}: allowed: auto, {', '.join(FORMATS)}")
    found = look(path, _tokenizer(tokenizer or "bytes"), **chosen)
    mapped = "".join(f", {ours}: {theirs}" for ours, theirs in found.columns.items())
    lines = [
        f"{found.path}: {found.format} ({found.told_by}{mapped}) in {found.num_files} "
        f"{found.container} file{'s' * (found.num_files != 1)}, {found.num_rows:,} rows",
        *([f"columns: {', '.join(found.seen)}"] if found.seen else []),
        *(["what is learned stands in [[ ]]"] if found.samples else []),
    ]
    for sample in found.samples:
        text = "".join(f"[[{t}]]" if learned else t for t, learned in sample.pieces)
        lines += [f"{one_line(sample.where)}:", text.rstrip("\n")]
    emit(found, "\n".join(lines), json)


def _named(said: list[str]) -> dict[str, str]:
    pairs = [one.partition("=") for one in said]
    if bad := next((one for one, (_, _, theirs) in zip(said, pairs) if not theirs), None):
        raise UserError(f"--column {bad}: write OURS=THEIRS, e.g. prompt=question")
    return {ours: theirs for ours, _, theirs in pairs}


def _tokenizer(name: str) -> Tokenizer:
    from shardwise.config.schema import TokenizerConfig
    from shardwise.data.tokenizer import load_tokenizer

    return load_tokenizer(TokenizerConfig() if name == "bytes" else name)


def _source(path: Path, kind: str, field: str | None) -> DataSource:
    from shardwise.data.files import find_files
    from shardwise.data.formats import CONVERSATIONS
    from shardwise.data.source import DataSource
    from shardwise.data.streams import suffix_of

    if kind == "auto":
        suffixes = {suffix_of(file) for file in find_files(path)}
        known = {".jsonl": "jsonl", ".parquet": "parquet"}
        known |= dict.fromkeys((".json", ".arrow"), "documents")
        if len(suffixes) > 1 and suffixes & known.keys():
            names = ", ".join(sorted(s or "none" for s in suffixes))
            raise UserError(
                f"{path}: holds files of several kinds ({names}); say which to read with --kind"
            )
        kind = known.get(suffixes.pop(), "text")
    allowed = ("text", "jsonl", "parquet", "documents", *CONVERSATIONS)
    if kind not in allowed:
        raise UserError(f"--kind {kind}: allowed: auto, {', '.join(allowed)}")
    return DataSource(kind=kind, path=path, field=field)  # type: ignore[arg-type]
