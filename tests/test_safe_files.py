"""A FIFO, a folder, a device or a huge file in a file's place is refused at once, everywhere."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardwise import safe_files
from shardwise.checkpoint.convert import open_model
from shardwise.config.load import load_config
from shardwise.config.schema import TokenizerConfig
from shardwise.data.indexed import IndexedStore
from shardwise.data.tokenizer import ByteTokenizer, load_tokenizer
from shardwise.errors import DataError, ShardwiseError
from shardwise.metrics.jsonl import JsonLines, read_jsonl
from shardwise.report.rundata import load_run
from shardwise.stages.results import read_result, write_result


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


KINDS: dict[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
}


def _template(path: Path) -> object:
    return load_tokenizer(TokenizerConfig(chat_template=str(path)))


def _config(path: Path) -> object:
    (path.parent / "model.safetensors").write_bytes(b"")
    path.rename(path.parent / "config.json")
    return open_model(path.parent)


def _weights(path: Path) -> object:
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 1}  # fmt: skip
    (path.parent / "config.json").write_text(json.dumps(config))
    path.rename(path.parent / "model.safetensors")
    return list(open_model(path.parent).tensors)


def _store(path: Path) -> object:
    path.rename(path.parent / "s.idx")
    (path.parent / "s.bin").write_bytes(b"")
    return IndexedStore(path.parent / "s")


READERS: dict[str, Callable[[Path], object]] = {
    "recipe": load_config,
    "tokenizer.json": load_tokenizer,
    "template": _template,
    "tiktoken": lambda p: load_tokenizer(TokenizerConfig(kind="tiktoken", path=p)),
    "sentencepiece": lambda p: load_tokenizer(TokenizerConfig(kind="sentencepiece", path=p)),
    "config.json": _config,
    "weights": _weights,
    "store": _store,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reader: str
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    KINDS[kind](Path("x"))
    with pytest.raises((ShardwiseError, OSError)):
        READERS[reader](Path("x"))


def test_huge_files_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(safe_files.MAX_TEXT_BYTES + 1)
    with pytest.raises(DataError, match="more than"):
        load_tokenizer(path)
    ByteTokenizer().save(tmp_path)
    (tmp_path / "hashes.json").unlink()
    spec = json.loads(path.read_text())
    for number in (4294967290, 1 << 25, -1, 1 << 80, 1e30, None):
        spec["model"]["vocab"]["a"] = number
        path.write_text(json.dumps(spec))
        with pytest.raises(DataError):
            load_tokenizer(tmp_path)
    path.write_text("[" * 1_000_000)
    with pytest.raises(DataError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_damaged_sentencepiece_and_tiktoken_files(tmp_path: Path) -> None:
    for data in (b"\x80" * 1_000_000, b"\x0a" + b"\xff" * 9 + b"\x01", b"\x08" * 100):
        (tmp_path / "m.model").write_bytes(data)
        with pytest.raises(DataError, match=r"m\.model"):
            load_tokenizer(tmp_path / "m.model")
    for line in (b"QQ== 99999999999", b"QQ== 2147483646", b"QUFB" * 100_000 + b" 5", b"x"):
        (tmp_path / "t.tiktoken").write_bytes(line)
        with pytest.raises(DataError, match="line 1"):
            load_tokenizer(TokenizerConfig(kind="tiktoken", path=tmp_path / "t.tiktoken"))


@pytest.fixture
def watchdog() -> Iterator[None]:
    """A read that waits for a writer would wait for ever."""

    def stuck(*_: object) -> None:
        raise AssertionError("stuck")

    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("kind", KINDS)
def test_side_files_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A resume moves it aside and goes on; a report names it."""
    monkeypatch.chdir(tmp_path)
    for name in ("metrics.jsonl", "notes.jsonl", "summary.json", "config.yaml"):
        (run := Path(name[:3])).mkdir()
        (run / "summary.json").write_text("{}")
        (run / name).unlink(missing_ok=True)
        KINDS[kind](run / name)
        with pytest.raises(DataError, match=name):
            load_run(run)
    for name in ("result.json", "start.json"):
        KINDS[kind](Path(name))
        assert read_result(Path(name)) is None
        write_result(Path(name), {"a": 1})
        assert read_result(Path(name), ["a"])
    KINDS[kind](Path("metrics.jsonl"))
    lines = JsonLines(Path("metrics.jsonl"))
    lines.append({"a": 1})
    lines.close()
    assert "kept as" in lines.damaged and list(read_jsonl(Path("metrics.jsonl")))
