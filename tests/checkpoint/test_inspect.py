"""What `inspect` and `diff` tell."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise import checkpoint
from shardwise.checkpoint.differences import _compare
from tests.checkpoint.tools import FILES, content, save


def test_inspect_tells_what_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    summary = checkpoint.inspect(tmp_path)
    tensors = content(3)
    assert summary.path == str(path) and summary.step == 3 and summary.meta == {"step": 3}
    assert summary.num_tensors == len(tensors)
    assert summary.num_elements == sum(t.numel() for t in tensors.values())
    assert summary.num_bytes == sum(
        p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    embed = next(t for t in summary.tensors if t.name == "model.embed.weight")
    assert (embed.dtype, embed.shape, embed.num_bytes, embed.num_chunks) == (
        "F32", (64, 20), 64 * 20 * 4, 1,
    )  # fmt: skip
    assert FILES.keys() < summary.files.keys()
    assert json.loads(json.dumps(summary.to_json()))["step"] == 3


def test_equal_checkpoints_have_no_difference(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert checkpoint.diff(a, b).equal
    assert checkpoint.diff(tmp_path / "a", a).equal


def test_diff_names_everything(tmp_path: Path) -> None:
    one, two = content(1), content(1)
    two["model.embed.weight"][3, 4] += 0.5
    two["model.embed.weight"][0, 0] = math.nan
    two["optim.step"] = torch.tensor(4.0)
    two["model.norm.weight"] = one["model.norm.weight"].float()  # the same values
    two["model.mask"] = torch.ones(3, dtype=torch.bool)
    two["new"] = two.pop("model.empty")
    a = checkpoint.save(tmp_path, 1, one, {"lr": 1.0, "data": {"seen": 3, "seed": 1}}, FILES)
    meta = {"lr": 1, "data": {"seen": 4, "seed": 1}, "x": 0}
    free = {"model.embed.weight"}
    b = checkpoint.save(tmp_path, 2, two, meta, {"config.json": b"[]"}, nonfinite=free)
    found = checkpoint.diff(a, b)
    assert not found.equal and (found.only_a, found.only_b) == (["model.empty"], ["new"])
    assert found.shapes == {"model.mask": ((9,), (3,))}
    assert found.dtypes == {"model.norm.weight": ("BF16", "F32")}
    embed, step = found.values
    assert (embed.name, embed.num_different, embed.num_elements) == ("model.embed.weight", 2, 1280)
    assert math.isnan(embed.max_abs)
    assert (step.name, step.max_abs, step.max_rel) == ("optim.step", 3.0, 0.75)
    assert found.meta == {"lr": (1.0, 1), "data.seen": (3, 4), "x": (None, 0)}
    assert found.files == ["config.json", "tokenizer/tokenizer.json"]
    assert found.to_json()["equal"] is False


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=6))
def test_a_difference_is_told_exactly_when_the_bits_differ(
    pairs: list[tuple[float, float]],
) -> None:
    a, b = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    found = _compare("w", a, b)
    assert (found is None) == torch.equal(a.view(torch.int32), b.view(torch.int32))
    if found and bool((a.isfinite() & b.isfinite()).all()):
        assert found.max_abs == (a.double() - b.double()).abs().max()
        assert 0 <= found.max_rel <= 2
