"""How results leave a command: sentences on the terminal, JSON in a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from shardwise import integrity, terminal
from shardwise.errors import UserError

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="F", help="Write the result as JSON to F; - for stdout."),
]


def _trust_files(wanted: bool) -> None:
    """What `NoVerify` does: ranks inherit the environment."""
    if wanted:
        os.environ[integrity.NO_VERIFY] = "1"
    if os.environ.get(integrity.NO_VERIFY) and os.environ.get("RANK", "0") == "0":
        terminal.say(
            "warning: files are not compared with their hashes (--no-verify): damaged or exchanged "
            "tokens, tokenizers and imported weights would be used without a word",
            sys.stderr,
        )


NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        callback=_trust_files,
        help="Use token stores, tokenizers and imported weights even if they are not what was "
        "written: damage then goes unnoticed.",
    ),
]


@contextlib.contextmanager
def json_alone(json_file: str | None) -> Iterator[None]:
    """With ``--json -``, what the work inside prints, ranks included, goes to stderr."""
    if json_file != "-":
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)  # ranks inherit the descriptor
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def emit(result: Any, text: str, json_file: str | None) -> None:
    """Print ``text``, and write ``result`` where ``--json`` says. With ``-``, only the JSON."""
    if json_file is None:
        terminal.say(text)
        return
    document = terminal.json_text(json.dumps(plain(result), indent=1, ensure_ascii=False))
    if json_file == "-":
        terminal.say(document)
        return
    if text:
        terminal.say(text)
    write_file("--json", json_file, document + "\n")


def write_file(option: str, file: str, text: str) -> None:
    """Write what ``option`` asks for, all of it or nothing. Raises UserError."""
    path = Path(file).resolve()
    fresh = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # a pipe or a device; a folder is refused
            path.write_text(text, encoding="utf-8")
            return
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise UserError(f"{option} {file}: cannot be written: {error.strerror}") from None


def size(num_bytes: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
