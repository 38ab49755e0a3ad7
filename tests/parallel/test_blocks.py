"""Recompute and compile around blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel import blocks
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool


def gradients(layout: str, compiled: bool) -> dict[str, Tensor]:
    config = NativeConfig(layout=layout, precision="fp64", compile=compiled)
    mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
    it = NativeEngine(toy.llama(num_layers=1), config, mesh, seed=7, optimizer=AdamWConfig())
    it.forward_backward([toy.batch(2)], CausalLM())
    grads = {n: p.grad for n, p in it.named.parameters.items()}
    return {n: g.full_tensor() for n, g in grads.items() if isinstance(g, DTensor)}


@pytest.mark.skipif(not blocks.compiler_available(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cp2.ring", "cp2.ulysses"])
def test_context_parallel_blocks_compile_around_their_attention(
    ranks: RankPool, layout: str
) -> None:
    compiled, eager = (ranks.run(gradients, layout, c, world=2)[0] for c in (True, False))
    assert compiled.keys() == eager.keys() and len(eager) > 5
    for name, grad in eager.items():
        assert (compiled[name] - grad).norm() <= 1e-9 * grad.norm(), name


def test_selective_recompute_keeps_products_and_attention() -> None:
    def policy(op: Any) -> CheckpointPolicy:
        return blocks._keep_dear_ops(None, op)

    class Registered:  # as flash-attn's operators are once it is imported
        def name(self) -> str:
            return "flash_attn::_flash_attn_varlen_forward"

    flash = Registered()
    assert policy(torch.ops.aten.mm.default) == policy(flash) == CheckpointPolicy.MUST_SAVE
    assert policy(torch.ops.aten.add.Tensor) == CheckpointPolicy.PREFER_RECOMPUTE
