"""Attention over a cut sequence against attention over a whole one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardwise.ops import attention_blocks, comm, rng
from shardwise.ops.attention import BRANCH_SHIFT, attention, causal_mask
from shardwise.parallel.context import (
    ContextAttention,
    ContextMask,
    gather_tokens,
    multiple_of,
    token_index,
)
from tests.support.pool import RankPool

ROWS, HEADS, KV_HEADS, TOKENS, WIDTH = 2, 8, 2, 32, 4


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the tokens may see."""

    name: str
    segments: bool = False
    branches: bool = False
    window: int | None = None
    dropout: float = 0.0
    kv_heads: int = KV_HEADS
    head_offset: int = 0
    by_columns: bool = False  # memory order of the inputs' last two dimensions swapped
    soft_cap: float | None = None
    sinks: bool = False

    def masks(self) -> tuple[Tensor, Tensor | None]:
        positions = torch.arange(TOKENS).expand(ROWS, -1).clone()
        segments = None
        if self.segments:
            g = torch.Generator().manual_seed(3)
            starts = torch.rand(ROWS, TOKENS, generator=g) < 0.2
            starts[1, 5:8] = True  # tokens that see nothing but themselves
            segments = starts.long().cumsum(1)
        if self.branches:
            segments = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
            segments[:, 8:18], positions[:, 8:18] = 1 << BRANCH_SHIFT, torch.arange(8, 18)
            segments[:, 18:28], positions[:, 18:28] = 2 << BRANCH_SHIFT, torch.arange(8, 18)
            segments[:, 28:] = 1  # padding
        return positions, segments

    def tensors(self) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(7)
        heads = (HEADS, self.kv_heads, self.kv_heads, HEADS)
        shapes = [(ROWS, h, TOKENS, WIDTH) for h in heads]
        return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """What is named only where it is."""
        found: dict[str, Any] = {} if self.soft_cap is None else {"soft_cap": self.soft_cap}
        if self.sinks:
            found["sinks_H"] = torch.linspace(-2.0, 2.0, HEADS, dtype=dtype).requires_grad_()
        return found

    def rng(self) -> Tensor | None:
        if not self.dropout:
            return None
        return rng.token_keys(1, 2, "s", torch.arange(ROWS), torch.arange(TOKENS))


SCENES = [
    Scene("causal"),
    Scene("all heads their own", kv_heads=HEADS),
    Scene("packed", segments=True),
    Scene("branches", branches=True),
    Scene("window", window=5),
    Scene("window that holds all", window=TOKENS),
    Scene("packed window", segments=True, window=3),
    Scene("branches window", branches=True, window=12),
    Scene("one key head", kv_heads=1),
    Scene("strided", by_columns=True),
    Scene("dropout", dropout=0.3),
    Scene("dropout of later heads", dropout=0.3, head_offset=5),
    Scene("packed dropout", segments=True, dropout=0.3),
    Scene("soft cap", soft_cap=0.5),
    Scene("sinks", sinks=True),
    Scene("sinks of a packed window", sinks=True, segments=True, window=3),
]


def _whole(scene: Scene, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, grad = (t.to(dtype) for t in scene.tensors())
    leaves = [t.requires_grad_() for t in (q, k, v)]
    positions, segments = scene.masks()
    mask = causal_mask(positions, dtype, segments, scene.window)
    options = scene.options(dtype)
    out = attention(
        *leaves,
        mask,
        **options,
        dropout_p=scene.dropout,
        rng_keys_BT=scene.rng(),
        salt=1,
        head_offset=scene.head_offset,
    )
    out.backward(grad)
    found = [out.detach(), *(t.grad for t in (*leaves, *_sinks(options)))]
    return found  # type: ignore[return-value]


def _sinks(options: dict[str, Any]) -> list[Tensor]:
    return [options["sinks_H"]] if "sinks_H" in options else []


def _parts(scene: Scene, kind: str, dtype: torch.dtype) -> list[Tensor]:
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert group is not None
    index = token_index(TOKENS, size, rank, kind)
    q, k, v, grad = (t.to(dtype)[:, :, index].contiguous() for t in scene.tensors())
    if scene.by_columns:
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    positions, segments = scene.masks()
    keys, options = scene.rng(), scene.options(dtype)
    out = ContextAttention(group, kind)(
        *leaves,
        ContextMask(index, segments, positions, scene.window),
        **options,
        dropout_p=scene.dropout,
        rng_keys_BT=None if keys is None else keys[:, index],
        salt=1,
        head_offset=scene.head_offset,
    )
    out.backward(grad)
    found = [out.detach(), *(t.grad for t in leaves)]
    for sinks in _sinks(options):  # a parameter: its gradient is summed over the ranks
        assert sinks.grad is not None
        dist.all_reduce(sinks.grad)
    whole = [gather_tokens(t, 2, group, kind) for t in found]  # type: ignore[arg-type]
    return [*whole, *(t.grad for t in _sinks(options))]  # type: ignore[list-item]


def _error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: s.name)
@pytest.mark.parametrize("kind,world", [("ring", 2), ("ring", 4), ("ulysses", 2), ("ulysses", 4)])
def test_equals_one_process(ranks: RankPool, scene: Scene, kind: str, world: int) -> None:
    expected = _whole(scene, torch.float64)
    for found in ranks.run(_parts, scene, kind, torch.float64, world=world):
        for got, want in zip(found, expected, strict=True):
            assert _error(got, want) < 1e-12


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_one_rank_is_a_ring_too(ranks: RankPool, kind: str) -> None:
    [found] = ranks.run(_parts, SCENES[0], kind, torch.float64, world=1)
    for got, want in zip(found, _whole(SCENES[0], torch.float64), strict=True):
        assert _error(got, want) < 1e-12


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_bf16_loses_what_one_process_loses(ranks: RankPool, kind: str) -> None:
    scene = SCENES[2]
    exact, single = _whole(scene, torch.float64), _whole(scene, torch.bfloat16)
    [found, _] = ranks.run(_parts, scene, kind, torch.bfloat16, world=2)
    for got, one, want in zip(found, single, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() <= 3 * (one - want).norm()


@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from(["ring", "ulysses"]))
def test_tokens_are_dealt_once_and_evenly(size: int, chunk: int, kind: str) -> None:
    total = multiple_of(size, kind) * chunk
    dealt = [token_index(total, size, r, kind) for r in range(size)]
    assert torch.equal(torch.cat(dealt).sort().values, torch.arange(total))
    assert all(torch.equal(d, d.sort().values) for d in dealt)
    if kind == "ring":  # causal work is the same for all
        assert len({int((d + 1).sum()) for d in dealt}) == 1


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens are not a multiple of 4"):
        token_index(10, 2, 0, "ring")
    with pytest.raises(ValueError, match="10 tokens are not a multiple of 4"):
        token_index(10, 4, 0, "ulysses")


def _refusal() -> str:
    group = dist.group.WORLD
    assert group is not None
    x, index = torch.zeros(1, 3, 4, 4), token_index(8, 2, group.rank(), "ulysses")
    with pytest.raises(ValueError) as caught:
        ContextAttention(group, "ulysses")(x, x, x, ContextMask(index, None, torch.arange(8)[None]))
    return str(caught.value)


def test_ulysses_refuses_heads_that_do_not_divide(ranks: RankPool) -> None:
    for message in ranks.run(_refusal, world=2):
        assert message == "ulysses: 2 ranks do not divide 3 query heads"


def _work(scene: Scene) -> list[tuple[str, int, bool]]:
    """What this rank does, in order: shifts, and blocks with their area and whether masked."""
    done: list[tuple[str, int, bool]] = []
    shift, forward = comm.ring_shift, attention_blocks.forward

    def shifting(*args: Any) -> Any:
        done.append(("shift", 0, False))
        return shift(*args)

    def computing(q: Tensor, k: Tensor, v: Tensor, block: Any) -> Any:
        done.append(("block", q.shape[2] * k.shape[2], block.allowed_B1TS is not None))
        return forward(q, k, v, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "ring_shift", shifting)
        patch.setattr(attention_blocks, "forward", computing)
        group, rank = dist.group.WORLD, dist.get_rank()
        assert group is not None
        index = token_index(TOKENS, group.size(), rank, "ring")
        q, k, v = (t[:, :, index].contiguous() for t in scene.tensors()[:3])
        positions, segments = scene.masks()
        ContextAttention(group, "ring")(
            q, k, v, ContextMask(index, segments, positions, scene.window)
        )
    return done


@pytest.mark.parametrize("name", ["causal", "window that holds all"])
def test_causal_work_is_even_unmasked_and_behind_a_shift(ranks: RankPool, name: str) -> None:
    [scene] = [s for s in SCENES if s.name == name]
    area = (TOKENS // 4) ** 2
    blocks = [("block", area, False), *[("block", area // 2, False)] * 3]
    shift = ("shift", 0, False)
    expected = [shift, blocks[0], shift, blocks[1], shift, blocks[2], blocks[3]]
    assert ranks.run(_work, scene, world=4) == [expected] * 4


def test_invisible_blocks_are_not_computed(ranks: RankPool) -> None:
    [scene] = [s for s in SCENES if s.name == "packed window"]
    for done in ranks.run(_work, scene, world=4):
        assert [d[0] for d in done].count("shift") == 3
        assert 0 < [d[0] for d in done].count("block") < 4


@pytest.mark.parametrize("how", ["rectangle", "causal", "masked"])
def test_fused_block_equals_the_explicit_one(how: str) -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v, grad = (
        torch.randn(2, h, 8, 4, generator=g, dtype=torch.float64) for h in (4, 2, 2, 4)
    )
    allowed = torch.rand(2, 1, 8, 8, generator=g) < 0.4
    allowed[0, 0, 3] = False  # a query that sees nothing
    block = attention_blocks.Block(
        slice(0, 8), slice(0, 8), allowed if how == "masked" else None, how == "causal"
    )
    fused = attention_blocks.forward(q, k, v, block)
    explicit = attention_blocks._explicit_forward(q, k, v, block)
    torch.testing.assert_close(fused, explicit, rtol=1e-12, atol=1e-14)
    # As if other blocks had added as much again, the blind query apart.
    merged = (fused[0] + grad.roll(1), fused[1] + 0.7)
    if how == "masked":
        assert not fused[0][0, :, 3].any()
        merged[0][0, :, 3] = 0.0
    found = attention_blocks.backward(grad, q, k, v, *merged, block)
    wanted = attention_blocks._explicit_backward(grad, q, k, v, *merged, block)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert how != "masked" or not found[0][0, :, 3].any()


def _gathered(kind: str) -> Any:
    group = dist.group.WORLD
    assert group is not None
    index = token_index(8, group.size(), group.rank(), kind)
    mine = index.double().requires_grad_()
    whole = gather_tokens(mine[None], 1, group, kind)
    (whole * torch.arange(8.0)).sum().backward()
    return whole.detach(), mine.grad, index


def test_gathering_hands_each_rank_its_own_gradient(ranks: RankPool) -> None:
    for kind in ("ring", "ulysses"):
        for whole, grad, index in ranks.run(_gathered, kind, world=2):
            assert torch.equal(whole[0], torch.arange(8.0).double())
            assert torch.equal(grad, index.double())
