"""`spmd_types` over one training step: an opinion beside `shardwise verify` that sees no values.

What it finds and what it cannot: docs/results/verify.md.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from shardwise.config.schema import NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from shardwise.verify.roles import world_of
from tests.support import toy
from tests.support.pool import RankPool
from tests.verify import bugs, edited_bugs
from tests.verify.edits import Edit, applied

spmd = pytest.importorskip("spmd_types")
pytestmark = pytest.mark.slow

MODELS = {
    "llama": toy.llama(),
    "llama-untied-odd": toy.llama(
        tie_embeddings=False, qkv_bias=True, qk_norm=True, num_kv_heads=4, ffn_size=47
    ),
    "gpt2": toy.gpt2(),
}
LAYOUTS = ("tp2", "tp2.sp", "tp4.sp", "dp2.zero0", "dp2.zero2", "dp4.hsdp2.zero3.tp2.sp")

TENSOR, NAMED = "parallel/tensor.py", "engines/named_parameters.py"
NORMS = "parallel/norms.py"
_SUM = "        tensor.sum_partial([g for n, g in grads.items() if n in self.partial], self.mesh)\n"
# By name: model, layout, edit.
EDITS = {
    "partial_sums_reduced_twice": ("llama", "tp2.sp", Edit(NAMED, _SUM, _SUM * 2)),
    "whole_gradients_reduced": (
        "llama",
        "tp2",
        Edit(
            NAMED,
            "for n, g in grads.items() if n in self.partial]",
            "for n, g in grads.items() if tp_dim(self.parameters[n], self.mesh) is None]",
        ),
    ),
    "no_sum_behind_row_product": (
        "llama",
        "tp2",
        Edit(
            TENSOR,
            "out = self.axis.leave(self.product(x_BTI, self.weight, None))",
            "out = self.product(x_BTI, self.weight, None)",
        ),
    ),
    "region_entered_without_its_conjugate": (
        "llama",
        "tp2",
        Edit(NORMS, "return self.axis.enter(y) if self.enters else y", "return y"),
    ),
    "regions_of_data_ranks": (
        "llama",
        "dp2.zero2.tp2",
        Edit(TENSOR, "regions.register(group)", 'regions.register(mesh.groups["dp"])'),
    ),
    "gradients_cut_but_not_summed_over_data_ranks": (
        "llama",
        "dp2.zero2",
        Edit(
            "parallel/collectives.py",
            'comm.reduce_scatter(output_tensor, input_tensor, group, "shard").wait()',
            "output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])",
        ),
    ),
}
for name in (
    "norms_inside_heads_summed_only_with_sequence_parallelism",
    "biases_behind_the_scatter_not_reduced",
    "position_table_gradient_not_reduced",
    "final_norm_gradient_not_reduced",
    "counts_of_one_data_rank",
    "norm_without_the_other_tensor_ranks",
    "each_shard_clipped_by_its_own_norm",
):
    of = edited_bugs.BUGS[name]
    EDITS[name] = (of.model, of.layout, *of.edits)
PATCHES = (
    "sequence_parallel_norm_gradients_not_reduced",
    "replicated_kv_head_gradients_not_summed",
    "input_gradient_not_summed_over_tensor_ranks",
    "gathered_tokens_gradient_cut_but_not_summed",
    "row_bias_added_on_every_rank",
)


def step(layout: str, model: str, edits: tuple[Edit, ...] = (), patch: str = "") -> str:
    """On every rank: what the checker says of an update's gradients and their norm."""
    from tests.prove.spmd_rules import typed

    with contextlib.ExitStack() as stack:
        stack.enter_context(applied(edits))
        for planted in bugs.BUGS[patch].plant() if patch else ():
            stack.enter_context(planted)
        config = NativeConfig.model_validate({"layout": layout, "compile": False})
        mesh = build_mesh(parse_layout(layout, world_of(layout)), torch.device("cpu"))
        engine = NativeEngine(MODELS[model], config, mesh, seed=7)
        batch = toy.batch(8)
        batches = batch.split(8 // engine.data_size)[engine.data_rank].split(2)
        try:
            with typed(engine) as told:
                for each in batches:
                    told.batch(each)
                engine.forward_backward(batches, CausalLM())
                engine.named.grad_norm()
        except spmd.SpmdTypeError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_well_typed(layout: str, model: str, ranks: RankPool) -> None:
    assert ranks.run(step, layout, model, world=world_of(layout)) == [""] * world_of(layout)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_not(name: str, ranks: RankPool) -> None:
    model, layout, *edits = EDITS[name]
    assert all(ranks.run(step, layout, model, tuple(edits), world=world_of(layout)))


@pytest.mark.parametrize("name", PATCHES)
def test_a_patched_bug_is_not(name: str, ranks: RankPool) -> None:
    bug: Any = bugs.BUGS[name]
    assert all(ranks.run(step, bug.layout, bug.model, (), name, world=world_of(bug.layout)))
