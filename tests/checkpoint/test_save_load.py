"""Round trips, what is refused, and which checkpoints stay."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from shardwise import checkpoint
from shardwise.checkpoint import MismatchError, Writer, loading, saving, shards
from shardwise.errors import CheckpointError
from tests.checkpoint.tools import FILES, assert_equal, blank, content, newest, patched, save


@pytest.mark.parametrize("verify", ["full", "fast", "off"])
def test_what_is_saved_is_loaded(tmp_path: Path, verify: loading.Verify) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "step_00000007" == checkpoint.latest(tmp_path)
    into = blank(content(7))
    assert checkpoint.load(tmp_path, into, verify=verify) == {"step": 7}
    assert_equal(into, content(7))
    assert checkpoint.verify(path) == []
    assert checkpoint.read_files(path) == FILES
    assert checkpoint.read_meta(path) == {"step": 7}
    assert_equal(dict(checkpoint.read_tensors(path)), content(7))


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"),
        st.tuples(hnp.array_shapes(min_dims=0, min_side=0), st.sampled_from([*shards.DTYPES])),
        max_size=4,
    )
)
def test_any_names_shapes_and_dtypes(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    tensors = {}
    for name, (shape, dtype) in spec.items():
        numel = torch.Size(shape).numel() * shards.DTYPES[dtype].itemsize
        raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (numel,), dtype=torch.uint8)
        tensors[name] = raw.view(shards.DTYPES[dtype]).reshape(shape)
    path = checkpoint.save(tmp_path_factory.mktemp("any"), 1, tensors, {}, nonfinite=tensors)
    into = {name: torch.empty_like(t) for name, t in tensors.items()}
    checkpoint.load(path, into, nonfinite=tensors)
    for name, tensor in tensors.items():
        assert torch.equal(into[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_large_tensors_span_blocks_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "MAX_SHARD_BYTES", 3000)
    monkeypatch.setattr("shardwise.checkpoint.writer.BLOCK_BYTES", 64)
    monkeypatch.setattr("shardwise.checkpoint.saving.BLOCK_BYTES", 64)
    monkeypatch.setattr("shardwise.checkpoint.writer.HASH_BYTES", 48)
    monkeypatch.setattr("shardwise.checkpoint.checks.HASH_BYTES", 40)
    monkeypatch.setattr(loading, "READ_BYTES", 100)
    monkeypatch.setattr(loading, "MAX_OPEN_FILES", 1)
    path = save(tmp_path, 1)
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) == 2
    assert {k: v for s in shards for k, v in load_file(s).items()}.keys() == {
        name for name, t in content(1).items() if t.numel()
    }
    # strided targets are filled row group by row group, contiguous ones in place
    into = {n: torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0] for n, t in content(1).items()}
    checkpoint.load(path, into)
    assert_equal(into, content(1))
    assert checkpoint.verify(path) == []


def test_a_checkpoint_that_does_not_fit_is_refused_with_a_diff(tmp_path: Path) -> None:
    """Fault row 22."""
    path = save(tmp_path, 1)
    into = blank(content(1))
    into["model.embed.weight"] = torch.zeros(80, 20)
    into["model.norm.weight"] = torch.zeros(20)
    into["model.layers.9.weight"] = torch.zeros(3)
    with pytest.raises(MismatchError) as refused:
        checkpoint.load(path, into)
    for line in (
        "3 differences; nothing was loaded",
        "model.embed.weight: shape [64, 20] in the checkpoint, [80, 20] here",
        "model.norm.weight: dtype BF16 in the checkpoint, F32 here",
        "model.layers.9.weight: not in the checkpoint",
    ):
        assert line in str(refused.value)
    assert not any(t.any() for t in into.values())
    with pytest.raises(MismatchError):  # an older checkpoint would not fit either
        save(tmp_path, 2)
        checkpoint.load_latest(tmp_path, into)


def test_tensors_that_nobody_wants_are_refused_unless_partial(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    into = {"model.norm.weight": torch.zeros(20, dtype=torch.bfloat16)}
    with pytest.raises(MismatchError, match=r"optim.step: only in the checkpoint"):
        checkpoint.load(path, into)
    assert not into["model.norm.weight"].any()
    checkpoint.load(path, into, partial=True)
    assert torch.equal(into["model.norm.weight"], content(1)["model.norm.weight"])


def test_a_long_diff_says_how_much_it_leaves_out(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {}, {})
    with pytest.raises(MismatchError, match=r"50 differences.*\n(.*\n)*  and 30 more"):
        checkpoint.load(path, {f"w{i}": torch.zeros(1) for i in range(50)})


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"a": {1: 2}}, r"meta\.a: the key 1 is not a string"),
        ({"a": [0, float("nan")]}, r"meta\.a\[1\]: nan is not JSON"),
        ({"a": torch.zeros(1)}, r"meta\.a: a Tensor is not JSON"),
        ({"a": Path("x")}, r"meta\.a: a PosixPath is not JSON"),
    ],
)
def test_meta_must_be_json(tmp_path: Path, meta: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, 1, {}, meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", ".hidden", "", "a//b", "a\nb", "shard-1"])
def test_file_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="name"):
        checkpoint.save(tmp_path, 1, {}, {}, {name: b""})
    assert list(tmp_path.iterdir()) == []


def test_the_newest_the_best_and_the_protected_stay(tmp_path: Path) -> None:
    metrics = {10: 3.0, 20: 1.0, 30: float("nan"), 40: 2.0, 50: 2.0, 60: None}
    for step, metric in metrics.items():
        save(tmp_path, step, keep=2, metric=metric, protect=[10])
    assert checkpoint.list_steps(tmp_path) == [10, 20, 50, 60]
    assert checkpoint.best(tmp_path) == tmp_path / "step_00000020"
    removed = checkpoint.prune(tmp_path, keep=1)
    assert [p.name for p in removed] == ["step_00000010", "step_00000050"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.json", "latest.json", "step_00000020", "step_00000060",
    ]  # fmt: skip


def test_best_may_be_the_highest_or_marked_later(tmp_path: Path) -> None:
    save(tmp_path, 1, metric=0.5, lower_is_better=False)
    save(tmp_path, 2, metric=0.4, lower_is_better=False)
    assert checkpoint.best(tmp_path) == tmp_path / "step_00000001"
    assert not checkpoint.mark_best(tmp_path, 2, 0.45, lower_is_better=False)
    assert checkpoint.mark_best(tmp_path, 2, 0.55, lower_is_better=False)
    assert checkpoint.best(tmp_path) == tmp_path / "step_00000002"
    with pytest.raises(CheckpointError, match="step 9"):
        checkpoint.mark_best(tmp_path, 9, 1.0)


def test_a_run_that_went_back_stays_there(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert newest(tmp_path) == 15
    assert checkpoint.list_steps(tmp_path) == [15, 20, 30]  # not reached again, not pruned
    save(tmp_path, 20)
    assert newest(tmp_path) == 20


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    tensors = {"w": torch.ones(3)}
    path = checkpoint.save(tmp_path, 1, tensors, {"again": True})
    assert checkpoint.read_meta(path) == {"again": True}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000001"]


def test_a_displaced_step_is_found_until_its_successor_is_there(tmp_path: Path) -> None:
    """What a kill between the two renames of a replaced step leaves behind."""
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step_00000002.old-0123")
    assert newest(tmp_path) == 2
    save(tmp_path, 3)
    assert checkpoint.list_steps(tmp_path) == [1, 2, 3]
    save(tmp_path, 2)
    assert newest(tmp_path) == 2
    save(tmp_path, 4, keep=9)
    assert not list(tmp_path.glob("*.old-*"))


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is checkpoint.best(tmp_path) is None
    assert checkpoint.list_steps(tmp_path / "absent") == []
    assert checkpoint.load_latest(tmp_path, {}) is None
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        checkpoint.load(tmp_path, {})
    with pytest.raises(CheckpointError, match="at least one"):
        checkpoint.save(tmp_path, 1, {}, {}, keep=0)


def test_async_copies_first_and_writes_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    writer = patched("shard", gate.wait)
    tensors, meta = content(1), {"step": 1}
    with checkpoint.AsyncSaver(tmp_path, writer=writer, keep=1) as saver:
        saver.save(1, tensors, meta, FILES)
        assert saver.in_flight and checkpoint.latest(tmp_path) is None
        for tensor in tensors.values():
            tensor.zero_()
        meta["step"] = 99
        gate.set()
        with caplog.at_level(logging.INFO):
            saver.save(2, content(2), {"step": 2}, FILES)
        assert newest(tmp_path) in (1, 2)
    assert newest(tmp_path) == 2
    assert checkpoint.list_steps(tmp_path) == [2]


def test_async_says_that_it_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    saver = checkpoint.AsyncSaver(tmp_path, writer=patched("rename", gate.wait))
    saver.save(1, content(1), {"step": 1})
    threading.Timer(0.2, gate.set).start()
    with caplog.at_level(logging.INFO):
        saver.save(2, content(2), {"step": 2})
    assert "waiting for the checkpoint of step 1 to be durable" in caplog.text
    saver.close()
    assert newest(tmp_path) == 2


def test_an_async_error_does_not_cancel_the_next_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    saver = checkpoint.AsyncSaver(tmp_path, writer=patched("write", fail))
    saver.save(1, content(1), {"step": 1})
    saver.save(2, content(2), {"step": 2})
    saver.close()
    assert "step 2 is saved in place of one that failed" in caplog.text
    assert "disk full" in caplog.text
    assert newest(tmp_path) == 2


def test_async_does_not_hide_an_error_under_way(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(30, "Read-only file system")

    with (
        pytest.raises(KeyError) as raised,
        checkpoint.AsyncSaver(tmp_path, writer=patched("write", fail)) as saver,
    ):
        saver.save(1, content(1), {"step": 1})
        raise KeyError("loss")
    assert "read-only" in raised.value.__notes__[0]


def test_async_refuses_at_once_what_cannot_be_saved(tmp_path: Path) -> None:
    saver = checkpoint.AsyncSaver(tmp_path)
    with pytest.raises(CheckpointError, match="meta"):
        saver.save(1, {}, {"a": object()})
    assert not saver.in_flight


def test_a_synchronous_save_leaves_one_in_flight_alone(tmp_path: Path) -> None:
    gate = threading.Event()
    saver = checkpoint.AsyncSaver(tmp_path, writer=patched("shard", gate.wait))
    saver.save(1, content(1), {"step": 1})
    while not list(tmp_path.glob("*.tmp-*")):
        assert saver.in_flight
    save(tmp_path, 2)
    gate.set()
    saver.close()
    assert checkpoint.list_steps(tmp_path) == [1, 2]


def test_documents_are_plain_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1, metric=1.0)
    document = json.loads((path / "manifest.json").read_text())
    chunk = document["tensors"]["model.embed.weight"]["chunks"][0]
    assert {"offset", "shape", "file", "key"} < chunk.keys()
    assert document["files"]["config.json"]["size"] == len(FILES["config.json"])
    assert {"torch", "shardwise"} < document["versions"].keys()
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 1
    assert json.loads((tmp_path / "best.json").read_text())["metric"] == 1.0


def test_the_writer_is_called_phase_by_phase(tmp_path: Path) -> None:
    called: list[str] = []
    writer = Writer()
    for phase in ("stage", "shard", "extras", "manifest", "rename", "pointer", "prune"):

        def method(*args: object, _f: object = getattr(writer, phase), _n: str = phase) -> object:
            called.append(_n)
            return _f(*args)  # type: ignore[operator]

        setattr(writer, phase, method)
    save(tmp_path, 1, writer=writer, keep=1, metric=1.0)
    assert called == [
        "stage", "shard", "extras", "manifest", "rename", "pointer", "pointer", "prune",
    ]  # fmt: skip
