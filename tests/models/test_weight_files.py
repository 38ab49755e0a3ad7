"""Folders whose weights could be taken for others: read as transformers does, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwise.errors import CheckpointError
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.models.weight_files import INDEX, SINGLE
from tests.support import toy

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, untied."""
    config = toy.llama(tie_embeddings=False)
    model = registry.build(config)
    init_weights(model, 0)
    registry.to_hf(tmp_path, config, model.named_parameters())
    return tmp_path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SINGLE)


def rewrite(folder: Path, tensors: dict[str, Tensor], name: str = SINGLE) -> None:
    save_file(tensors, folder / name, metadata={"format": "pt"})


def cut(folder: Path) -> dict[str, str]:
    """Into two shards and their index, of which nothing is wrong; returns the map."""
    whole = weights(folder)
    names = sorted(whole)
    parts = {A: names[:9], B: names[9:]}
    for shard, held in parts.items():
        rewrite(folder, {n: whole[n] for n in held}, shard)
    given = {n: shard for shard, held in parts.items() for n in held}
    (folder / INDEX).write_text(json.dumps({"weight_map": given}))
    (folder / SINGLE).unlink()
    return given


def read(folder: Path) -> dict[str, Tensor]:
    return dict(registry.from_hf(folder)[1])


def test_shards_and_a_file_beside_an_older_index(folder: Path) -> None:
    whole, before = weights(folder), read(folder)
    cut(folder)
    assert all(torch.equal(t, before[n]) for n, t in read(folder).items())
    rewrite(folder, {n: t + 1 for n, t in whole.items()})  # as transformers: the file counts
    assert torch.equal(read(folder)["norm.weight"], before["norm.weight"] + 1)


def test_an_index_that_does_not_fit(folder: Path) -> None:
    given = cut(folder)
    first, last = sorted(given)[0], sorted(given)[-1]

    def refused(said: str, **changes: str | None) -> None:
        changed = {k: v for k, v in (given | changes).items() if v is not None}
        (folder / INDEX).write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=said):
            registry.from_hf(folder)

    refused(f"gives {last} to {A}, which does not hold it|gives {last} to {A}", **{last: A})
    refused(f"gives {first} to no file, and {A} holds it", **{first: None})
    refused("gives new to .*, which does not hold it", new=A)
    refused("names gone.safetensors, which is not there", new="gone.safetensors")
    rewrite(folder, load_file(folder / B) | {first: torch.zeros(1)}, B)
    refused(f"gives {first} to {A}, and {B} holds it too")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.fp16.safetensors", "variant"),
        (A, "read by their index"),
        ("weights.safetensors", "rename it"),
        ("pytorch_model.bin", "pickled weights are not loaded"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights are not loaded"),
        ("q4.gguf", "give the .gguf file itself"),
    ],
)
def test_what_is_there_instead(folder: Path, name: str, said: str) -> None:
    (folder / SINGLE).rename(folder / name)
    with pytest.raises(CheckpointError, match=f"{name}; .*{said}"):
        registry.from_hf(folder)


def test_adapters_are_refused_with_weights_beside_them_too(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter.*merge"):
        registry.from_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json; .*merge"):
        registry.from_hf(folder)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    good = weights(folder)
    cases = {
        "norm.weight has the shape": {NORM: torch.ones(31)},
        "head.weight has the shape": {HEAD: good[HEAD][:-1].clone()},
        "stored as torch.int8: quantised": {HEAD: good[HEAD].to(torch.int8)},
        "stored as torch.float8_e4m3fn: quantised": {HEAD: good[HEAD].to(torch.float8_e4m3fn)},
        "is stored twice": {"norm.weight": good[NORM].clone()},
        "'model.layers.7.x' is not part": {"model.layers.7.x": good[NORM].clone()},
    }
    for said, wrong in cases.items():
        rewrite(folder, good | wrong)
        with pytest.raises(CheckpointError, match=said):
            read(folder)
    rewrite(folder, {n: t for n, t in good.items() if n != HEAD})
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint: lm_head\.weight"):
        read(folder)


def test_a_stored_head_must_be_what_it_is_tied_to(folder: Path) -> None:
    good, config = weights(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match="both are stored and differ"):
        read(folder)
    rewrite(folder, good | {HEAD: good[EMBED].clone()})
    assert torch.equal(read(folder)["embed.weight"], good[EMBED])
