"""`shardwise data prepare|inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    kind: Annotated[str, typer.Option(help="auto (by suffix), text, jsonl or parquet.")] = "auto",
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
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Its prefix, .bin or .idx.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="To decode samples with; as for prepare.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 3,
    no_verify: NoVerify = False,
    json: JsonOption = None,
) -> None:
    """What a token store holds: counts, lengths, the beginning of some documents."""
    from shardwise.data.prepare import inspect as run

    found = run(store, _tokenizer(tokenizer) if tokenizer else None, num_samples=samples)
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


def _tokenizer(name: str) -> Tokenizer:
    from shardwise.config.schema import TokenizerConfig
    from shardwise.data.tokenizer import load_tokenizer

    return load_tokenizer(TokenizerConfig() if name == "bytes" else name)


def _source(path: Path, kind: str, field: str | None) -> DataSource:
    from shardwise.data.files import find_files
    from shardwise.data.source import DataSource
    from shardwise.data.streams import suffix_of

    if kind == "auto":
        suffixes = {suffix_of(file) for file in find_files(path)}
        known = {".jsonl": "jsonl", ".parquet": "parquet"}
        if len(suffixes) > 1 and suffixes & known.keys():
            names = ", ".join(sorted(s or "none" for s in suffixes))
            raise UserError(
                f"{path}: holds files of several kinds ({names}); say which to read with --kind"
            )
        kind = known.get(suffixes.pop(), "text")
    if kind not in ("text", "jsonl", "parquet"):
        raise UserError(f"--kind {kind}: allowed: auto, text, jsonl, parquet")
    return DataSource(kind=kind, path=path, field=field)  # type: ignore[arg-type]
