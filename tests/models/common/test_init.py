"""Initial weights: the same numbers on every layout, with the scheme's statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shardwise.errors import CheckpointError
from shardwise.models.common import init
from shardwise.models.common.init import (
    InitSpec,
    init_spec,
    init_tensor,
    init_weights,
    load_weights,
    plain_name,
)
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.registry import build
from shardwise.ops import rng
from tests.support.pool import RankPool

CONFIG = LlamaConfig(
    vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=24
)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_rows_are_slices_of_the_whole(num_rows: int, width: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_rows))
    stop = data.draw(st.integers(start, num_rows))
    before = init._BLOCK_ELEMENTS
    try:
        init._BLOCK_ELEMENTS = 16  # several blocks even in a small tensor
        whole = init_tensor("w", (num_rows, width), InitSpec("normal"), 3)
        part = init_tensor("w", (num_rows, width), InitSpec("normal"), 3, slice(start, stop))
    finally:
        init._BLOCK_ELEMENTS = before
    assert torch.equal(part, whole[start:stop])


def test_numbers_depend_on_seed_name_and_shape_alone() -> None:
    spec = InitSpec("normal")
    one = init_tensor("w", (8, 8), spec, 0)
    torch.manual_seed(123)
    assert torch.equal(one, init_tensor("w", (8, 8), spec, 0))
    for other in (
        init_tensor("w", (8, 8), spec, 1),
        init_tensor("v", (8, 8), spec, 0),
        init_tensor("w", (16, 8), spec, 0)[:8],
    ):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("shape", [(1,), (7, 5), (300, 64), (87380, 3), (87382, 3), (2, 300000)])
def test_a_small_tensor_starts_as_its_whole_block_would(shape: tuple[int, ...]) -> None:
    """So that runs of a seed stay what they were."""
    width = math.prod(shape[1:])
    rows = max(1, (1 << 18) // width)
    g = torch.Generator().manual_seed(rng.key(3, "init", "w", *shape, 0))
    whole = torch.randn((rows, *shape[1:]), generator=g) * 0.02
    first = min(rows, shape[0])
    assert torch.equal(init_tensor("w", shape, InitSpec("normal"), 3)[:first], whole[:first])


def test_scheme() -> None:
    model = CONFIG.model_copy(update={"num_layers": 8}).spec
    assert init_spec("layers.0.attn.q.bias", model).kind == "zeros"
    assert init_spec("layers.0.attn.q_norm.weight", model).kind == "ones"
    assert init_spec("norm.weight", model).kind == "ones"
    assert init_spec("embed.weight", model) == InitSpec("normal", 0.02)
    assert init_spec("layers.3.attn.o.weight", model) == InitSpec("normal", 0.005)
    assert init_spec("layers.3.mlp.down.weight", model) == InitSpec("normal", 0.005)
    values = init_tensor("x", (1000, 100), InitSpec("normal", 0.02), 0)
    assert float(values.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(values.mean())) < 0.02 / 100_000**0.5 * 5


def test_wrappers_do_not_change_names() -> None:
    assert plain_name("layers.0._checkpoint_wrapped_module._orig_mod.attn.q.weight") == (
        "layers.0.attn.q.weight"
    )


def test_meta_build_equals_direct_build() -> None:
    with torch.device("meta"):
        late = build(CONFIG)
    late.to_empty(device="cpu")
    now = build(CONFIG)
    init_weights(late, 5)
    init_weights(now, 5)
    assert late.head.weight is late.embed.weight  # type: ignore[union-attr]
    for (name, a), (_, b) in zip(late.named_parameters(), now.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_load_names_what_does_not_fit() -> None:
    model = build(CONFIG)
    named = dict(build(CONFIG).named_parameters())
    with pytest.raises(CheckpointError, match=r"norm\.weight.*shape"):
        load_weights(model, (named | {"norm.weight": torch.ones(3)}).items())
    with pytest.raises(CheckpointError, match="no parameter"):
        load_weights(model, (named | {"extra": torch.ones(3)}).items())
    with pytest.raises(CheckpointError, match=r"no tensor for the parameters embed\.weight"):
        load_weights(model, ((k, v) for k, v in named.items() if k != "embed.weight"))
    load_weights(model, named.items())
    assert all(torch.equal(p, named[n]) for n, p in model.named_parameters())


def _sharded_models() -> list[str]:
    """Names of parameters whose gathered value differs from one process's, on any layout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    plain = build(CONFIG)
    init_weights(plain, 9)
    expected = dict(plain.named_parameters())
    wrong = []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for layout in ("zero", "hsdp", "column", "strided"):
        model: nn.Module = build(CONFIG)
        if layout in ("column", "strided"):
            for name, param in list(model.named_parameters()):
                if not name.endswith(("q.weight", "down.weight")):
                    continue
                owner = model.get_submodule(name.rpartition(".")[0])
                dim = 1 if "down" in name else 0
                value = distribute_tensor(torch.zeros_like(param), mesh["tp"], [Shard(dim)])
                owner.weight = nn.Parameter(value)
        if layout != "column":
            for module in (*model.layers, model):  # type: ignore[misc]
                fully_shard(module, mesh=mesh if layout == "hsdp" else mesh["dp"])
        for fill in ("init", "load"):
            with torch.no_grad():
                for param in model.parameters():
                    param.zero_()
            if fill == "init":
                init_weights(model, 9)
            else:
                load_weights(model, expected.items())
            for name, param in model.named_parameters():
                whole = param.full_tensor() if isinstance(param, DTensor) else param
                if not torch.equal(whole, expected[name]):
                    wrong.append(f"{layout} {fill} {name}")
    return wrong


def _mixed_precision() -> tuple[bool, bool, bool]:
    """From meta to FSDP2 in bf16: still tied, and bitwise the plain bf16 model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    with torch.device("meta"):
        model: nn.Module = build(CONFIG)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for module in (*model.layers, model):  # type: ignore[misc]
        fully_shard(module, mp_policy=policy)
    model.to_empty(device="cpu")
    init_weights(model, 9)
    tied = model.head.weight is model.embed.weight  # type: ignore[union-attr]
    plain = build(CONFIG)
    init_weights(plain, 9)
    ids, positions = torch.arange(12)[None], 3000 + torch.arange(12)[None]
    expected = plain.bfloat16()(ids, positions)
    got = model(ids, positions)
    got.float().square().sum().backward()
    has_grads = all(p.grad is not None for p in model.parameters())
    return tied, torch.equal(got, expected), has_grads


def test_mixed_precision_keeps_rotary_tables_wide(ranks: RankPool) -> None:
    """FSDP2 casts floating-point arguments of a block; the tables must not be among them."""
    assert ranks.run(_mixed_precision, world=4) == [(True, True, True)] * 4


def test_sharded_parameters_hold_their_part(ranks: RankPool) -> None:
    """FSDP2, HSDP, tensor-parallel and FSDP2 over tensor-parallel (strided shards)."""
    assert ranks.run(_sharded_models, world=4) == [[]] * 4
