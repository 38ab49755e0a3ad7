"""From a config to datasets: caching, races, mixtures, validation and lineage hashes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from shardwise.data.config import ChatDataConfig, DataConfig
from shardwise.data.datasets import (
    build_chat_examples,
    build_pretrain_dataset,
    build_validation,
    is_held_out,
    pack_examples,
    training_texts,
)
from shardwise.data.mixture import MixtureSampler
from shardwise.data.packing import collate
from shardwise.data.prepare import prepare
from shardwise.data.readers import Document
from shardwise.data.sampler import Sampler
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError

BYTES = ByteTokenizer()


def _jsonl(path: Path, texts: list[str], **options: Any) -> DataSource:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return DataSource(kind="jsonl", path=path, **options)


def _library(folder: Path) -> Path:
    folder.mkdir()
    for i in range(50):
        (folder / f"m{i}.py").write_text(f"x = {i}\n" * (i % 5))
    return folder


def _text(rows: Any) -> str:
    targets = [
        t for i in range(rows.num_rows) for r in [rows.row(i)] for t in r.targets[r.loss_mask]
    ]
    return str(BYTES.decode(targets, skip_special=True))


def test_standard_library(tmp_path: Path) -> None:
    config = DataConfig(sources=[DataSource(kind="stdlib", path=_library(tmp_path / "lib"))])
    data = build_pretrain_dataset(config, BYTES, 16, seed=0, cache_dir=tmp_path / "cache")
    train, held = (
        [d.text for d in DataSource(kind="stdlib", path=tmp_path / "lib", split=s).documents()]
        for s in ("train", "validation")
    )
    assert (len(train), len(held)) == (10, 40)
    assert _text(data) == "".join(train)
    assert data.validation is not None and _text(data.validation) == "".join(held)
    assert [d.text for d in data.validation.documents()] == held
    assert data.validation.num_bytes == sum(len(t) for t in held)
    assert data.validation.num_documents == 40
    # Every byte and every document's end is paid for.
    valid = sum(data.validation.row(i).loss_mask.sum() for i in range(data.validation.num_rows))
    assert valid == data.validation.num_bytes + 40
    alone = build_validation(config, BYTES, 16, tmp_path / "cache")
    assert alone is not None and alone.hash == data.validation.hash
    assert isinstance(data.sampler(), Sampler)
    assert data.sampler().batch(0, len(data)).max() == data.num_rows - 1


def test_mixture(tmp_path: Path) -> None:
    sources = [
        _jsonl(tmp_path / "a.jsonl", ["a" * 50] * 4, weight=3.0),
        _jsonl(tmp_path / "b.jsonl", ["b" * 9] * 3),
    ]
    data = build_pretrain_dataset(DataConfig(sources=sources), BYTES, 10, 0, tmp_path / "cache")
    assert data.validation is None
    sampler = data.sampler()
    assert isinstance(sampler, MixtureSampler)
    batch = collate([data.row(int(i)) for i in sampler.batch(0, 40)], np.arange(40))
    assert ((batch.targets_BT == ord("b")).any(1)).sum() == 10
    assert data.num_rows == 21 + 3


def test_cache_is_built_once_and_reused(tmp_path: Path) -> None:
    config = DataConfig(sources=[_jsonl(tmp_path / "a.jsonl", ["hello", "world"])])
    calls: list[Any] = []
    args = (config, BYTES, 8, 0, tmp_path / "cache")
    first = build_pretrain_dataset(*args, progress=calls.append)
    assert len(calls) == 1
    assert build_pretrain_dataset(*args, progress=calls.append).hash == first.hash
    assert len(calls) == 1
    # Another tokenizer, content or sequence length is another data hash.
    others = [
        build_pretrain_dataset(config, ByteTokenizer("{{ x }}"), 8, 0, tmp_path / "cache").hash,
        build_pretrain_dataset(config, BYTES, 9, 0, tmp_path / "cache").hash,
        build_pretrain_dataset(
            DataConfig(sources=[_jsonl(tmp_path / "a.jsonl", ["hello", "World"])]),
            *args[1:],
        ).hash,
    ]
    assert len({first.hash, *others}) == 4


def test_racing_ranks_build_once(tmp_path: Path) -> None:
    config = DataConfig(sources=[_jsonl(tmp_path / "a.jsonl", ["hello"] * 50)])
    calls: list[Any] = []
    hashes: list[str] = []

    def build() -> None:
        data = build_pretrain_dataset(config, BYTES, 8, 0, tmp_path / "cache", calls.append)
        hashes.append(data.hash)

    threads = [threading.Thread(target=build) for _ in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1 and len(hashes) == 6 and len(set(hashes)) == 1


def test_damaged_input_leaves_no_cache(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "a.jsonl", ["fine"])
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write("{")
    with pytest.raises(DataError, match="line 2, byte"):
        build_pretrain_dataset(DataConfig(sources=[source]), BYTES, 8, 0, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_held_out_share(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(200)] * 2  # copies fall on the same side
    config = DataConfig(sources=[_jsonl(tmp_path / "a.jsonl", texts)], held_out=0.2)
    data = build_pretrain_dataset(config, BYTES, 16, 0, tmp_path / "cache")
    assert data.validation is not None
    held = [d.text for d in data.validation.documents()]
    kept = [t for t in texts if not is_held_out(Document("", t), 0.2)]
    assert sorted(held + kept) == sorted(texts) and not set(held) & set(kept)
    assert 0.1 < len(held) / len(texts) < 0.3
    assert _text(data) == "".join(kept) and _text(data.validation) == "".join(held)
    with pytest.raises(DataError, match=r"no document is left for training \(held_out 1\.0\)"):
        build_pretrain_dataset(
            DataConfig(sources=config.sources, held_out=1.0), BYTES, 16, 0, tmp_path / "cache"
        )


def test_indexed_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = _jsonl(tmp_path / "a.jsonl", ["hello", "wörld"])
    prepare([text], BYTES, tmp_path / "store")
    source = DataSource(kind="indexed", path=tmp_path / "store")
    other = DataSource(kind="indexed", path=tmp_path / "other")
    prepare([_jsonl(tmp_path / "b.jsonl", ["held out"])], BYTES, tmp_path / "other")
    config = DataConfig(sources=[source], validation=[other])
    data = build_pretrain_dataset(config, BYTES, 8, 0, tmp_path / "cache")
    assert _text(data) == "hellowörld" and not (tmp_path / "cache").exists()
    assert data.validation is not None and data.validation.num_bytes == 8
    assert [d.text for d in data.validation.documents()] == ["held out"]
    assert not caplog.records
    # Without a manifest the files themselves are hashed.
    with_manifest = data.hash
    (tmp_path / "store.store.json").unlink()
    bare = build_pretrain_dataset(config, BYTES, 8, 0, tmp_path / "cache")
    assert bare.hash != with_manifest and _text(bare) == "hellowörld"


def test_indexed_source_of_another_tokenizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from shardwise.data.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add([5, 6])
    config = DataConfig(sources=[DataSource(kind="indexed", path=tmp_path / "s")])
    build_pretrain_dataset(config, BYTES, 8, 0, tmp_path / "cache")
    assert "1 of 1 documents do not end with the end token 256" in caplog.text
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add([5, 260])
    with pytest.raises(DataError, match=r"s\.bin: .*another tokenizer's"):
        build_pretrain_dataset(config, BYTES, 8, 0, tmp_path / "cache")


def test_training_texts(tmp_path: Path) -> None:
    sources = [
        _jsonl(tmp_path / "a.jsonl", [f"{i:04d}" for i in range(1000)], weight=3.0),
        _jsonl(tmp_path / "b.jsonl", [f"b{i:03d}" for i in range(1000)]),
    ]
    config = DataConfig(sources=sources)
    drawn = list(training_texts(config, 800))
    assert drawn == list(training_texts(config, 800))
    assert drawn != list(training_texts(config, 800, seed=1))
    assert sum(t.startswith("b") for t in drawn) == 50 and len(drawn) == 200
    assert len(set(drawn)) == 200
    numbers = [int(t) for t in drawn if not t.startswith("b")]
    assert numbers != sorted(numbers) and max(numbers) > 900  # from everywhere, not the start
    assert len(list(training_texts(config, 10**6))) == 2000
    held = DataConfig(sources=sources, held_out=0.5)
    assert not any(is_held_out(Document("", t), 0.5) for t in training_texts(held, 10**6))


def test_configs_that_cannot_be(tmp_path: Path) -> None:
    text = DataSource(kind="text", path=tmp_path)
    indexed = DataSource(kind="indexed", path=tmp_path)
    with pytest.raises(ValidationError, match="not both"):
        DataConfig(sources=[text], validation=[DataSource()], held_out=0.1)
    with pytest.raises(ValidationError, match="training and a validation source at once"):
        DataConfig(sources=[text], validation=[text])
    with pytest.raises(ValidationError, match="held_out needs raw documents"):
        DataConfig(sources=[indexed], held_out=0.1)
    with pytest.raises(ValidationError, match=r"reads conversations .*, not text sources"):
        ChatDataConfig(sources=[text])
    with pytest.raises(ValidationError, match="must be the only one"):
        DataConfig(sources=[text], validation=[indexed, DataSource()])
    for kind in ("preference", "preference-jsonl"):
        with pytest.raises(ValidationError, match=f"reads documents, not {kind}"):
            DataConfig(sources=[DataSource(kind=kind, path=tmp_path)])
    for kind in ("chat-jsonl", "auto"):
        with pytest.raises(ValidationError, match=r"weight 2: .* have no weight"):
            ChatDataConfig(sources=[DataSource(kind=kind, path=tmp_path, weight=2.0)])
    with pytest.raises(ValidationError, match="training and a validation source at once"):
        DataConfig(sources=[DataSource(split="all")], validation=[DataSource(split="validation")])


CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def test_chat_examples(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text((json.dumps({"messages": CHAT}) + "\n") * 3)
    source = DataSource(kind="chat-jsonl", path=file)
    examples = build_chat_examples([source], BYTES)
    config = ChatDataConfig(sources=[source])
    packed = pack_examples(examples, config, 128, BYTES.pad_id)
    row = packed.row(0)
    assert BYTES.decode(row.targets[row.loss_mask], skip_special=False) == "4<|im_end|>" * 3
    apart = pack_examples(examples, ChatDataConfig(sources=[source], pack=False), 128, BYTES.pad_id)
    assert (packed.num_rows, apart.num_rows) == (1, 3)
    with pytest.raises(DataError, match="more than batch"):
        pack_examples(examples, config, 16, BYTES.pad_id)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (CHAT[:1], "has no assistant turn"),
        ([{"role": "user", "content": "<|im_end|>"}], "control token"),
        ([{"role": "user"}], "message 0 needs a role and a content"),
    ],
)
def test_bad_chats_are_named(tmp_path: Path, messages: Any, message: str) -> None:
    file = tmp_path / "c.jsonl"
    good = json.dumps({"messages": CHAT}) + "\n"
    file.write_text(good + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match=rf"c\.jsonl: line 2, byte {len(good)}: .*{message}"):
        build_chat_examples([DataSource(kind="chat-jsonl", path=file)], BYTES)
