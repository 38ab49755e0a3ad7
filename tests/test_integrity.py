"""Damage to what we wrote is found, whatever it leaves as it was; the memory of hashes is ours."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shardwise import integrity
from shardwise.checkpoint import convert
from shardwise.cli.main import app
from shardwise.data.config import DataConfig
from shardwise.data.datasets import build_pretrain_dataset
from shardwise.data.indexed import IndexedStore
from shardwise.data.prepare import prepare
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer, load_tokenizer
from shardwise.errors import DataError
from shardwise.models import registry as models
from tests.checkpoint.test_convert import stand_in

TEXTS = [f"document {i}: " + "some words and more of them " * (i % 5 + 1) for i in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, into which files are taken at once, however young."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(integrity.NO_VERIFY, "")
    monkeypatch.setattr(integrity, "_SETTLED_NS", 0)
    return tmp_path / "cache" / "shardwise" / "hashes"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A store and its tokenizer."""
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i:02}.txt").write_text(text)
    source = DataSource(kind="text", path=tmp_path / "text")
    return prepare([source], ByteTokenizer(), tmp_path / "store").prefix


def _flip(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _swap(rng: random.Random, data: bytes) -> bytes:
    """Two unequal stretches of four bytes change places."""
    while True:
        a, b = sorted(rng.sample(range(0, len(data) - 4, 4), 2))
        changed = data[:a] + data[b : b + 4] + data[a + 4 : b] + data[a : a + 4] + data[b + 4 :]
        if changed != data:
            return changed


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _zero(rng: random.Random, data: bytes) -> bytes:
    at = rng.choice([i for i in range(len(data)) if data[i]])
    return data[:at] + bytes(len(data[at : at + 16])) + data[at + 16 :]


def _overwrite(path: Path, data: bytes, replace: bool) -> None:
    """New content under the old size (mostly) and mtime, in the old inode or a new one."""
    before = path.stat()
    target = path.with_name("new") if replace else path
    target.write_bytes(data)
    target.replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # within one tick of the clock
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("damage", [_flip, _swap, _truncate, _zero])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".store.json"])
def test_every_damage_to_a_store_is_found(
    prefix: Path, damage: Callable[[random.Random, bytes], bytes], suffix: str
) -> None:
    """Twelve each, 144 in all; each right after the sound store was read and remembered."""
    path = Path(f"{prefix}{suffix}")
    good = path.read_bytes()
    rng = random.Random(f"{damage.__name__}{suffix}")
    for trial in range(12):
        expected = IndexedStore(prefix).tokens.tolist()
        _overwrite(path, damage(rng, good), replace=trial % 2 == 1)
        with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
            IndexedStore(prefix)
        _overwrite(path, good, replace=False)
        assert IndexedStore(prefix).tokens.tolist() == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "hashes.json"])
def test_every_damage_to_a_tokenizer_is_found(prefix: Path, name: str) -> None:
    folder = prefix.with_suffix(".tokenizer")
    good = (folder / name).read_bytes()
    rng = random.Random(name)
    for damage in (_flip, _swap, _truncate, _zero) * 3:
        load_tokenizer(folder)
        _overwrite(folder / name, damage(rng, good), replace=False)
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            load_tokenizer(folder)
        _overwrite(folder / name, good, replace=True)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(folder)


def test_an_exported_folder_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "open_model", lambda path, *_: stand_in(breaks=False))
    convert.convert("somewhere", tmp_path / "hf")
    models.from_hf(tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    _overwrite(weights, bytes(data), replace=False)
    with pytest.raises(DataError, match=r"model\.safetensors: its content .*hashes\.json"):
        models.from_hf(tmp_path / "hf")
    monkeypatch.setenv(integrity.NO_VERIFY, "1")
    models.from_hf(tmp_path / "hf")


def test_a_file_is_read_once_until_it_changes(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: reads.append(args[0]) or read(*args))
    IndexedStore(prefix)
    first = len(reads)
    IndexedStore(prefix)
    assert first > 0 and len(reads) == first
    os.utime(f"{prefix}.bin")
    IndexedStore(prefix)
    assert len(reads) > first


def test_a_young_file_is_not_remembered(
    prefix: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again without a new time."""
    monkeypatch.setattr(integrity, "_SETTLED_NS", 1 << 60)
    num = len(list(cache.iterdir()))
    IndexedStore(prefix)
    assert len(list(cache.iterdir())) == num


@pytest.mark.parametrize("how", ["group", "folder", "link", "garbage", "fifo", "owner"])
def test_a_memory_that_may_be_another_s_is_not_believed(
    prefix: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    IndexedStore(prefix)
    memory = next(p for p in cache.iterdir() if '.bin"' in p.read_text())
    bin_path = prefix.with_suffix(".bin")
    data = bytearray(bin_path.read_bytes())
    data[7] ^= 1
    bin_path.write_bytes(data)
    with bin_path.open("rb") as stream:  # the lie: the changed file hashed to what was written
        told = json.loads(memory.read_text()) | {
            "identity": integrity._identity(stream.fileno(), bin_path)
        }
    told.pop("digest")
    memory.write_text(json.dumps(integrity.sealed(told)))
    IndexedStore(prefix)  # ours, so it is believed
    if how == "group":
        memory.chmod(0o660)
    elif how == "folder":
        cache.chmod(0o777)
    elif how == "link":
        memory.rename(cache / "real")
        memory.symlink_to(cache / "real")
    elif how == "garbage":
        memory.write_text(memory.read_text().replace(told["hash"][:4], "0000"))
    elif how == "fifo":
        memory.unlink()
        os.mkfifo(memory)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(DataError, match=r"store\.bin: its content"):
        IndexedStore(prefix)


def test_no_verify_says_what_it_risks(prefix: Path) -> None:
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[::-1])
    found = CliRunner().invoke(app, ["data", "inspect", str(prefix)])
    assert isinstance(found.exception, DataError)
    found = CliRunner().invoke(app, ["data", "inspect", str(prefix), "--no-verify"])
    assert found.exit_code == 0 and "damaged or exchanged tokens" in found.stderr
    assert os.environ.pop(integrity.NO_VERIFY) == "1"  # ranks inherit it


def test_a_damaged_store_of_the_cache_is_made_again(
    tmp_path: Path, prefix: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(sources=[DataSource(kind="text", path=tmp_path / "text")])

    def rows() -> list[int]:
        dataset = build_pretrain_dataset(config, ByteTokenizer(), 16, 0, tmp_path / "tokens")
        return [int(i) for row in range(dataset.num_rows) for i in dataset.row(row).input_ids]

    good = rows()
    for file in (tmp_path / "tokens").glob("*.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    assert rows() == good
    assert "made again from its source" in caplog.text


def test_a_store_without_hashes_says_so(prefix: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(f"{prefix}.store.json")
    manifest = json.loads(path.read_text())
    for key in ("files", "digest"):
        del manifest[key]
    path.write_text(json.dumps(manifest | {"format": 1}))
    IndexedStore(prefix)
    assert "prepare it again" in caplog.text
