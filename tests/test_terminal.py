"""What is written to the terminal is text: nothing in it steers the terminal or the reader."""

from __future__ import annotations

import io
import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise import checkpoint, terminal
from shardwise.cli import main as cli
from shardwise.errors import UserError
from shardwise.metrics.progress import Progress

HOSTILE = [
    "\x1b[2J\x1b[1;31mred", "\x1b]0;title\x07", "\x1b]8;;http://evil\x1b\\link", "a\rb", "\x9b31m",
    "\u202eevil\u202c", "\u2066x\u2069", "nul\x00", "bell\x07", "\x08\x08\x08", "\u2028", "\x85",
    "\ufeff", "\U000e0041", "\ud800", "\u200b", "\x7f",
]  # fmt: skip


def steers(text: str) -> list[str]:
    """The characters of ``text`` that a terminal or a reader does not see as themselves."""
    allowed = "\n\t\u200c\u200d\xad"
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    arabic = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2"  # are seen
    return [c for c in text if unicodedata.category(c) in kinds and c not in allowed + arabic]


@given(st.text() | st.sampled_from(HOSTILE))
def test_text_is_only_text(text: str) -> None:
    shown = terminal.printable(text)
    assert not [c for c in steers(shown) if ord(c) < 0x10000]
    assert "\n" not in terminal.one_line(text) and "\t" not in terminal.one_line(text)
    document = json.dumps({"a": text}, ensure_ascii=False)
    assert json.loads(terminal.json_text(document)) == {"a": text}
    if not steers(text) and "\r" not in text:
        assert shown == text


def test_ordinary_text_stays() -> None:
    for text in ("Grüße, 世界 👩‍👩‍👧 नमस्ते\n\tx", "مرحبا", "a\xa0b"):
        assert terminal.printable(text) == text
    assert terminal.printable("two\r\nlines") == "two\nlines"
    assert terminal.printable("\x1b\u202e\r") == "\\x1b\\u202e\\r"


def test_a_stream_that_knows_no_unicode() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.say("grün \ud800", stream)
    assert stream.buffer.getvalue() == b"gr\\xfcn \\ud800\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_writer(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Progress, errors, usage, log lines, results and names of tensors."""

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["shardwise", *args])
        with pytest.raises(SystemExit):
            cli.main()

    stream = io.StringIO()
    Progress([], stream=stream).message(f"now {text}")
    logging.getLogger().handlers.clear()
    terminal.log_to_stderr()
    logging.getLogger("x").warning("said %s", text)
    logging.getLogger().handlers.clear()
    run("--no-such-" + text)
    run("data", "inspect", "--no-such-" + text)
    run("train", text.replace("\x00", "") or "x")
    if "\ud800" not in text:  # no file can hold it
        tensors = {f"w{text}\n  forged F32": torch.zeros(1)}
        run("checkpoint", "inspect", str(checkpoint.save(tmp_path / "ckpt", 1, tensors, {})))
    cli.emit({"x": text}, text, None)
    cli.emit({"x": text}, "", "-")
    monkeypatch.setattr(cli.launch, "check_ranks", lambda n: (_ for _ in ()).throw(UserError(text)))
    run("train", "x.yaml")
    out, err = capsys.readouterr()
    for written in (stream.getvalue(), out, err):
        assert written and not steers(written), written
    assert "\n  forged" not in out


def test_usage_keeps_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["shardwise", "train", "x.yaml", "--api-key=hunter2222"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "hunter2222" not in capsys.readouterr().err
