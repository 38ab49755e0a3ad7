"""Any layout into any other, bit for bit (the checkpoint's part of fault row 17).

The oracle is PyTorch's own: tensors are distributed from the true values by `fully_shard` and
`distribute_tensor`, and what is loaded into blank ones must equal those, rank by rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwise import checkpoint
from shardwise.errors import CheckpointError
from tests.checkpoint.tools import patched
from tests.support.pool import RankPool

SHAPES = {"embed": (10, 6), "up": (7, 6), "down": (6, 7), "norm": (6,), "odd": (3, 5), "one": (1,)}
# name: (ranks, mesh shape, {parameter: dim that tensor parallel cuts})
LAYOUTS: dict[str, tuple[int, tuple[int, ...], dict[str, int]]] = {
    "plain1": (1, (), {}),
    "plain2": (2, (), {}),
    "dp2": (2, (2,), {}),
    "dp4": (4, (4,), {}),
    "hsdp2x2": (4, (2, 2), {}),
    "dp2tp2": (4, (2, 2), {"embed": 0, "up": 0, "down": 1, "odd": 0}),
    "dp2tp2columns": (4, (2, 2), {"embed": 1, "up": 1, "down": 0, "odd": 1}),
}


def values(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) * 1000 + shape[0])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def build(layout: str, blank: bool) -> dict[str, Tensor]:
    """Parameters, a second moment and a step count in a layout; zeros if ``blank``."""
    _, mesh_shape, cuts = LAYOUTS[layout]
    module = nn.Module()
    for name, shape in SHAPES.items():
        module.register_parameter(name, nn.Parameter(values(name, shape)))
    if mesh_shape:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp")[: len(mesh_shape)])
        if "tp" in layout:
            for name, parameter in list(module.named_parameters()):
                place = [Shard(cuts[name]) if name in cuts else Replicate()]
                cut = distribute_tensor(parameter.detach(), mesh["tp"], place)
                module.register_parameter(name, nn.Parameter(cut))
            mesh = mesh["dp"]
        fully_shard(module, mesh=mesh)
    tensors = {f"model.{name}": p for name, p in module.named_parameters()}
    with torch.no_grad():
        moments = {f"optim.{n[6:]}.exp_avg_sq": p.detach().square() for n, p in tensors.items()}
    result: dict[str, Tensor] = {**tensors, **moments, "optim.step": torch.tensor(5)}
    if blank:
        for tensor in result.values():
            local = tensor.detach()
            (local.to_local() if isinstance(local, DTensor) else local).zero_()
    return result


def local(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def save_layout(layout: str, root: Path) -> None:
    checkpoint.save(root, 1, build(layout, False), {"layout": layout})


def load_layout(layout: str, root: Path, source: str) -> None:
    into, expected = build(layout, True), build(layout, False)
    assert checkpoint.load(root, into) == {"layout": source}
    for name in expected:
        assert torch.equal(local(into[name]), local(expected[name])), name


@pytest.mark.parametrize("source", LAYOUTS)
def test_from_each_layout_into_every_other(ranks: RankPool, tmp_path: Path, source: str) -> None:
    ranks.run(save_layout, source, tmp_path, world=LAYOUTS[source][0])
    for target in LAYOUTS:
        ranks.run(load_layout, target, tmp_path, source, world=LAYOUTS[target][0])
    path = tmp_path / "step_00000001"
    assert checkpoint.verify(path) == []
    for name, tensor in checkpoint.read_tensors(path):  # without torch.distributed
        true = values(name.split(".")[1], SHAPES[name.split(".")[1]]) if "step" not in name else 0
        if name.startswith("model."):
            assert torch.equal(tensor, true), name  # type: ignore[arg-type]


def test_replicas_are_written_once_and_spread(ranks: RankPool, tmp_path: Path) -> None:
    for layout in ("plain2", "hsdp2x2"):
        root = tmp_path / layout
        ranks.run(save_layout, layout, root, world=LAYOUTS[layout][0])
        document = json.loads((root / "step_00000001" / "manifest.json").read_text())
        num_values = sum(
            torch.Size(c["shape"]).numel()
            for t in document["tensors"].values()
            for c in t["chunks"]
        )
        assert num_values == 2 * sum(torch.Size(s).numel() for s in SHAPES.values()) + 1
        shards = list((root / "step_00000001").glob("shard-*.safetensors"))
        sizes = [p.stat().st_size for p in shards]
        assert len(sizes) == LAYOUTS[layout][0] and max(sizes) < 1.5 * min(sizes)


def stages(root: Path, load: bool) -> None:
    """Pipeline parallel: every rank holds other tensors; one is shared."""
    rank = dist.get_rank()
    tensors = {f"model.layers.{rank}.weight": torch.full((3,), 1.0 + rank), "tied": torch.ones(2)}
    if not load:
        checkpoint.save(root, 1, tensors, {})
        return
    into = {name: torch.zeros_like(t) for name, t in tensors.items()}
    checkpoint.load(root, into)
    assert all(torch.equal(into[n], t) for n, t in tensors.items())
    if rank == 1:
        into.pop("model.layers.1.weight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.weight: only in the checkpoint"):
        checkpoint.load(root, into)


def test_ranks_may_hold_different_tensors(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(stages, tmp_path, False)
    ranks.run(stages, tmp_path, True)
    into = {
        "model.layers.0.weight": torch.zeros(3),
        "model.layers.1.weight": torch.zeros(3),
        "tied": torch.zeros(2),
    }
    checkpoint.load(tmp_path, into)
    assert into["model.layers.1.weight"].tolist() == [2.0] * 3


def fails(root: Path, case: str) -> str:
    """Each rank reports the error that it saw."""
    rank = dist.get_rank()
    tensors: dict[str, Tensor] = {f"w{rank}": torch.ones(3)}
    step, writer = 1, None
    if rank == 1 and case == "tensor":
        tensors["w1"] = torch.ones(3, dtype=torch.complex64)
    if rank == 1 and case == "step":
        step = 2
    if rank == 1 and case == "shard":

        def full() -> None:
            raise OSError(28, "No space left on device")

        writer = patched("write", full)
    if case == "disagree":
        tensors = {"w": torch.ones(3 + rank)}
    try:
        if case == "load":
            checkpoint.load(root, {"w0": torch.ones(3 + rank)}, partial=True)
        else:
            checkpoint.save(root, step, tensors, {}, writer=writer)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("tensor", "rank 1: w1: torch.complex64 cannot be stored"),
        ("shard", "disk full"),
        ("step", "the ranks save different steps: [1, 2]"),
        ("disagree", "w: F32 [3] on rank 0, F32 [4] on rank 1"),
    ],
)
def test_one_rank_fails_all_with_the_cause(
    ranks: RankPool, tmp_path: Path, case: str, message: str
) -> None:
    first, second = ranks.run(fails, tmp_path, case)
    assert message in first and first == second
    if case == "shard":
        assert first.startswith("rank 1: ") and "shard-00001-000.safetensors" in first
    assert list(tmp_path.iterdir()) == []


def test_one_rank_that_cannot_load_stops_all(ranks: RankPool, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"w0": torch.ones(3)}, {})
    first, second = ranks.run(fails, tmp_path, "load")
    assert "rank 1: " in first and "w0: shape [3] in the checkpoint, [4] here" in first
    assert first == second


def damaged(root: Path) -> int:
    into = {"w0": torch.zeros(3)}
    found = checkpoint.load_latest(root, into)
    assert found is not None and into["w0"].tolist() == [1.0] * 3
    return found.step


def test_all_ranks_fall_back_together(ranks: RankPool, tmp_path: Path) -> None:
    for step in (1, 2):
        path = checkpoint.save(tmp_path, step, {"w0": torch.ones(3)}, {}, {"config.json": b"{}"})
    (path / "config.json").write_bytes(b"[]")
    assert ranks.run(damaged, tmp_path) == [1, 1]


def background(root: Path) -> None:
    """The main thread communicates over the default group while the saver does over its own."""
    tensors = build("dp2", False)
    with checkpoint.AsyncSaver(root, keep=2) as saver:
        for step in range(1, 5):
            saver.save(step, tensors, {"layout": "dp2"})
            for _ in range(20):
                total = torch.ones(4)
                dist.all_reduce(total)
                assert total.tolist() == [2.0] * 4
    assert checkpoint.list_steps(root) == [3, 4]


def test_async_beside_training(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(background, tmp_path)
    ranks.run(load_layout, "dp4", tmp_path, "dp2", world=4)


def pending(root: Path) -> str:
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (2,))
    tensor = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(CheckpointError) as refused:
        checkpoint.save(root, 1, {"grad": tensor}, {})
    return str(refused.value)


def test_a_pending_reduction_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    assert all("grad: holds a pending reduction" in m for m in ranks.run(pending, tmp_path))


def alone(root: Path) -> None:
    """Each rank saves and loads for itself, in a group of one."""
    groups = [dist.new_group([rank], backend="gloo") for rank in range(2)]
    rank = dist.get_rank()
    own = root / str(rank)
    checkpoint.save(own, rank, {"w": torch.full((3,), float(rank))}, {}, group=groups[rank])
    into = {"w": torch.zeros(3)}
    found = checkpoint.load_latest(own, into, group=groups[rank])
    assert found is not None and found.step == rank and into["w"].tolist() == [float(rank)] * 3
    with pytest.raises(CheckpointError, match="not in the group"):
        checkpoint.save(own, 9, {}, {}, group=groups[1 - rank])


def test_groups_save_apart(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(alone, tmp_path)


def changing(root: Path) -> None:
    """One saver, other tensors at every save: nothing of an older plan or copy is used."""
    rank = dist.get_rank()
    with checkpoint.AsyncSaver(root, keep=9) as saver:
        for step in range(1, 5):
            dtype = torch.float64 if step == 4 else torch.float32
            tensors = {f"w{i}": torch.full((step, 2), i + step, dtype=dtype) for i in range(3)}
            if step == 3:
                tensors[f"only{rank}"] = torch.ones(rank + 1)
            saver.save(step, tensors, {})
            for tensor in tensors.values():
                tensor.zero_()
    for step in range(1, 5):
        found = dict(checkpoint.read_tensors(root / f"step_0000000{step}"))
        assert len(found) == (5 if step == 3 else 3)
        for i in range(3):
            assert found[f"w{i}"].tolist() == [[i + step] * 2] * step


def test_an_async_saver_follows_changing_tensors(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(changing, tmp_path)
