"""Every damaged byte is noticed, and named (fault row 3): 200 seeded cases per kind of file."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise import checkpoint
from shardwise.checkpoint import DamagedError, loading
from tests.checkpoint.tools import assert_equal, blank, content, save

SHARD = "shard-00000-000.safetensors"


def damage(path: Path, rng: random.Random, span: tuple[int, int] | None = None) -> list[int]:
    """Hurt a file within ``span``; returns the offsets that changed."""
    before = path.read_bytes()
    low, high = span or (0, len(before))
    while True:
        data = bytearray(before)
        kind = rng.choice(["truncate", "delete", "zero", "flip"])
        if kind == "delete":
            path.unlink()
            return list(range(low, len(before)))
        if kind == "truncate":
            data = data[: rng.randrange(low, high)]
        elif kind == "zero":
            start = rng.randrange(low, high)
            end = min(start + 4096, high)
            data[start:end] = bytes(end - start)
        else:
            data[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
        changed = [i for i, old in enumerate(before) if i >= len(data) or data[i] != old]
        if changed:
            path.write_bytes(data)
            return changed


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """The bytes of each tensor in a safetensors file, read independently of the package."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    return {
        name: (8 + length + entry["data_offsets"][0], 8 + length + entry["data_offsets"][1])
        for name, entry in table.items()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sound checkpoints; every case mends what it damaged."""
    root = tmp_path_factory.mktemp("checkpoints")
    save(root, 1)
    save(root, 2, metric=1.0)
    return root


def hurt(
    path: Path, num_cases: int, span: tuple[int, int] | None = None
) -> Iterator[tuple[int, set[int]]]:
    """Damage a file in one case after another; yields the case and the offsets that changed."""
    sound = path.read_bytes()
    for seed in range(num_cases):
        yield seed, set(damage(path, random.Random(f"{path.name} {seed}"), span))
        path.write_bytes(sound)


def assert_refused(root: Path, file: str, tensors: set[str]) -> None:
    """Detected and named by `verify` and `load`; nothing is loaded; one step back works."""
    path = root / "step_00000002"
    problems = checkpoint.verify(path)
    assert {p.file for p in problems} == {str(path / file)}
    assert {p.tensor for p in problems} - {""} == tensors
    into = blank(content(2))
    with pytest.raises(DamagedError) as refused:
        checkpoint.load(path, into)
    assert str(path / file) in str(refused.value)
    assert all(name in str(refused.value) for name in tensors)
    assert not any(t.any() for t in into.values())
    with pytest.raises(DamagedError, match=file):
        checkpoint.load_latest(root, into, strict=True)


def assert_falls_back(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    into = blank(content(1))
    caplog.clear()
    loaded = checkpoint.load_latest(root, into)
    assert loaded is not None and loaded.step == 1 and loaded.meta == {"step": 1}
    assert_equal(into, content(1))
    assert any(r.levelno == logging.WARNING and "falling back" in r.message for r in caplog.records)


def test_values(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "step_00000002" / SHARD
    found = spans(path)
    span = min(a for a, _ in found.values()), max(b for _, b in found.values())
    for seed, changed in hurt(path, 200, span):
        tensors = {name for name, (a, b) in found.items() if not changed.isdisjoint(range(a, b))}
        assert tensors
        assert_refused(root, SHARD, tensors)
        if seed % 5 == 0:
            assert_falls_back(root, caplog)


def test_headers(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = root / "step_00000002"
    header = min(a for a, _ in spans(path / SHARD).values())
    for seed, _ in hurt(path / SHARD, 200, (0, header)):
        assert {p.file for p in checkpoint.verify(path)} == {str(path / SHARD)}
        with pytest.raises(DamagedError, match=SHARD):
            checkpoint.load(path, blank(content(2)))
        if seed % 5 == 0:
            assert_falls_back(root, caplog)


@pytest.mark.parametrize("file", ["config.json", "tokenizer/tokenizer.json", "manifest.json"])
def test_other_files(root: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    for seed, _ in hurt(root / "step_00000002" / file, 200):
        assert_refused(root, file, set())
        if seed % 5 == 0:
            assert_falls_back(root, caplog)
        if file != "manifest.json":
            with pytest.raises(DamagedError, match=file):
                checkpoint.read_files(root / "step_00000002")


@pytest.mark.parametrize("file", ["latest.json", "best.json"])
def test_pointers(root: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    for _ in hurt(root / file, 200):
        caplog.clear()
        assert checkpoint.latest(root) == root / "step_00000002"
        if file == "best.json":
            assert checkpoint.best(root) is None
        if (root / file).exists():
            assert file in caplog.text
            if file == "best.json":  # which one is the best is unknown: none may go
                assert checkpoint.prune(root, keep=1) == []


@pytest.mark.parametrize("verify", ["fast", "off"])
def test_what_less_checking_still_finds(root: Path, verify: loading.Verify) -> None:
    path = root / "step_00000002" / SHARD
    size = path.stat().st_size
    for _ in hurt(path, 40, spans(path)["model.embed.weight"]):
        resized = not path.exists() or path.stat().st_size != size
        if resized or verify == "fast":
            with pytest.raises(DamagedError, match=SHARD):
                checkpoint.load(root, blank(content(2)), verify=verify)
        else:
            checkpoint.load(root, blank(content(2)), verify=verify)


def test_every_problem_is_told_and_strangers_too(tmp_path: Path) -> None:
    root = tmp_path
    save(root, 1)
    save(root, 2)
    path = root / "step_00000002"
    (path / "config.json").write_bytes(b"{}")
    (path / "tokenizer" / "tokenizer.json").unlink()
    (path / "extra.bin").write_bytes(b"x")
    start, _ = spans(path / SHARD)["model.norm.weight"]
    data = bytearray((path / SHARD).read_bytes())
    data[start] ^= 1
    (path / SHARD).write_bytes(data)
    assert [str(p).removeprefix(f"{path}/") for p in checkpoint.verify(path)] == [
        "config.json: has 2 bytes where 18 were written",
        f"{SHARD}: tensor model.norm.weight: the bytes are not those written",
        "tokenizer/tokenizer.json: is missing",
        "extra.bin: is not part of the checkpoint",
    ]
    (path / "manifest.json").unlink()
    assert "missing" in str(checkpoint.verify(path)[0])


def test_only_one_step_back(tmp_path: Path) -> None:
    root = tmp_path
    save(root, 1)
    save(root, 2)
    save(root, 3)
    for step in (2, 3):
        (root / f"step_0000000{step}" / "config.json").unlink()
    with pytest.raises(DamagedError, match="step_00000002"):
        checkpoint.load_latest(root, blank(content(1)))
