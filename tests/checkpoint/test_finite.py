"""What is not finite is never committed, and no sound checkpoint goes for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from shardwise import checkpoint
from shardwise.checkpoint import NonFiniteError, shards
from tests.checkpoint.tools import content, newest, save
from tests.support.pool import RankPool

BAD = [math.nan, math.inf, -math.inf]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@given(st.sampled_from(FLOATS), st.integers(1, 300), st.sampled_from(BAD), st.data())
def test_every_float_is_looked_at(
    dtype: torch.dtype, size: int, bad: float, data: st.DataObject
) -> None:
    values = torch.arange(size, dtype=torch.float32).to(dtype)
    assert shards.is_finite(values) == bool(values.float().isfinite().all())
    where = data.draw(st.integers(0, size - 1))
    values = torch.zeros(size).index_fill(0, torch.tensor(where), bad).to(dtype)
    assert not shards.is_finite(values)
    assert shards.first_nonfinite("w", values).startswith(f"tensor w: {bad} at [{where}] (1 of")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    "name,bad",
    [("model.embed.weight", math.nan), ("optim.model.norm.weight.exp_avg", -math.inf)],
)
def test_a_good_checkpoint_outlives_a_bad_save(
    tmp_path: Path, background: bool, name: str, bad: float
) -> None:
    save(tmp_path, 1, keep=1)
    tensors = content(2)
    tensors[name].view(-1)[7] = bad
    with pytest.raises(NonFiniteError, match=rf"tensor {name}: {bad} at"):
        if background:
            with checkpoint.AsyncSaver(tmp_path, keep=1) as saver:
                saver.save(2, tensors, {"step": 2})
                tensors[name].view(-1)[7] = 0.0  # a later, sound save does not hide it
                saver.save(3, tensors, {"step": 3})
        else:
            checkpoint.save(tmp_path, 2, tensors, {"step": 2}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step_00000001"]
    assert newest(tmp_path) == 1


def test_values_that_were_only_observed_may_be_anything(tmp_path: Path) -> None:
    mask = {"mask": torch.full((3,), -math.inf), "w": torch.ones(2)}
    path = checkpoint.save(tmp_path, 1, mask, {}, nonfinite=["mask"])
    into = {name: torch.zeros_like(t) for name, t in mask.items()}
    checkpoint.load(path, into, nonfinite=["mask"])
    assert torch.equal(into["mask"], mask["mask"])
    with pytest.raises(NonFiniteError, match=r"tensor mask: -inf at \[0\] \(3 of 3 values\)"):
        checkpoint.load(path, into)


def poisoned(root: Path) -> str:
    """Rank 1 alone holds the bad value, in its shard."""
    local = torch.ones(4)
    local[2] = math.nan if dist.get_rank() == 1 else 1.0
    weight = DTensor.from_local(local, init_device_mesh("cpu", (2,)), [Shard(0)])
    with pytest.raises(NonFiniteError) as refused:
        checkpoint.save(root, 2, {"a": torch.ones(9), "w": weight}, {}, keep=1)
    return str(refused.value)


def test_one_ranks_shard_stops_all(ranks: RankPool, tmp_path: Path) -> None:
    save(tmp_path, 1)
    told = ranks.run(poisoned, tmp_path)
    assert told == ["rank 1: tensor w: nan at [2] (1 of 4 values)"] * 2
    assert checkpoint.list_steps(tmp_path) == [1]


def test_a_run_falls_back_from_one_that_was_committed_before(tmp_path: Path) -> None:
    """As a version that did not look could leave it."""
    checkpoint.save(tmp_path, 1, {"w": torch.ones(2)}, {})
    checkpoint.save(tmp_path, 2, {"w": torch.tensor([1.0, math.nan])}, {}, nonfinite=["w"])
    into = {"w": torch.zeros(2)}
    found = checkpoint.load_latest(tmp_path, into)
    assert found is not None and found.step == 1 and into["w"].tolist() == [1.0, 1.0]
