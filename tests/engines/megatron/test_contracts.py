"""Every call into megatron-core is one that its released versions accept; see tests/contracts."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from shardwise.config.schema import AdamWConfig
from shardwise.engines.base import Setup
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops.logits import selected_values
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from shardwise.precision.policy import precision_of
from tests.contracts.signatures import signature, versions
from tests.engines.megatron.test_engine import CPU, LLAMA, SCALAR, Squares
from tests.support import toy
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

LIBRARY, ROOT = "megatron_core", "megatron.core"
SPECS = "models.gpt.gpt_layer_specs"
BASE, DEALT_OUT = "optimizer.optimizer", "optimizer.distrib_optimizer.DistributedOptimizer"
# The call, where our modules find it, and under which name; "": a method, where the library has it.
PLACES = {
    "distributed.DistributedDataParallel": ("engine", ""),
    "distributed.DistributedDataParallel.start_param_sync": ("", ""),
    "distributed.DistributedDataParallelConfig": ("engine", ""),
    "distributed.finalize_model_grads": ("engine", ""),
    "models.gpt.gpt_model.GPTModel": ("model", ""),
    "models.gpt.gpt_model.GPTModel.forward": ("", ""),
    f"{SPECS}.get_gpt_layer_local_spec": ("model", "gpt_layer_specs"),
    f"{SPECS}.get_gpt_layer_with_transformer_engine_spec": ("model", "gpt_layer_specs"),
    "optimizer.OptimizerConfig": ("optimizer", "library"),
    "optimizer.ParamKey": ("optimizer", "library"),
    f"{DEALT_OUT}._copy_main_params_to_model_params": ("", ""),
    f"{DEALT_OUT}._get_model_param_range_map": ("", ""),
    f"{DEALT_OUT}.step_with_ready_grads": ("", ""),
    f"{DEALT_OUT}.zero_grad": ("", ""),
    "optimizer.get_megatron_optimizer": ("optimizer", "library"),
    f"{BASE}.MegatronOptimizer.clip_grad_norm": ("", ""),
    f"{BASE}.MegatronOptimizer.get_grad_norm": ("", ""),
    f"{BASE}.MixedPrecisionOptimizer.prepare_grads": ("", ""),
    "optimizer.ParamPredicate": ("optimizer", "library"),
    "pipeline_parallel.p2p_communication.P2PCommunicator": ("engine", ""),
    "pipeline_parallel.schedules.forward_backward_no_pipelining": ("engine", "schedules"),
    "pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving": (
        "engine",
        "schedules",
    ),
    "pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving": (
        "engine",
        "schedules",
    ),
    "tensor_parallel.mappings.copy_to_tensor_model_parallel_region": ("model", "mappings"),
    "tensor_parallel.mappings.gather_from_sequence_parallel_region": ("model", "mappings"),
    "tensor_parallel.random.model_parallel_cuda_manual_seed": ("engine", ""),
    "transformer.transformer_block.TransformerBlockSubmodules": ("model", ""),
}
Call = tuple[str, int, tuple[str, ...]]  # its name, positional arguments, keywords


def recorded(call: str, real: Callable[..., Any], into: set[Call]) -> Callable[..., Any]:
    own = call.endswith("GPTModel") or not any(PLACES[call])  # of a method, without its object

    @functools.wraps(real)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        into.add((call, len(args) - own, tuple(sorted(kwargs))))
        return real(*args, **kwargs)

    return stand_in


@contextlib.contextmanager
def watching(into: set[Call], **instead: Any) -> Any:
    """Calls into the library, noted; ``instead``: what a name does in place of the library."""
    with contextlib.ExitStack() as stack:
        for call, (module, inside) in PLACES.items():
            path, _, name = call.rpartition(".")
            if module:
                owner: Any = importlib.import_module(f"shardwise.engines.megatron.{module}")
                owner = getattr(owner, inside) if inside else owner
            else:
                where, _, of = path.rpartition(".")
                owner = getattr(importlib.import_module(f"{ROOT}.{where}"), of)
            real = instead.get(name, getattr(owner, name))
            if name == "GPTModel":  # stays a class: a method of it is watched, too
                owner, name, real = real, "__init__", real.__init__
            stack.enter_context(mock.patch.object(owner, name, recorded(call, real, into)))
        yield


def on_rank(layout: str, scalar: bool, clip: float = 1.0) -> set[Call]:
    into: set[Call] = set()
    model = SCALAR if scalar else LLAMA
    config = MegatronConfig(
        kind="megatron", layout=layout, precision="fp32", cpu_shim=True, max_grad_norm=clip
    )
    parsed = parse_layout(layout, dist.get_world_size())
    with watching(into):
        it = build_engine(Setup(model, config, parsed, CPU, 7, "test", AdamWConfig()))
        batch = toy.batch(8)
        it.forward_backward([batch], Squares() if scalar else CausalLM())
        it.step(1e-3)
        read = (lambda x, b: selected_values(x, b.loss_mask_BT)) if scalar else valid_logprobs
        it.forward([batch], read)
    it.close()
    return into


def gpu_calls() -> set[Call]:
    """Those that a GPU alone makes, with what the library would do left out."""
    from megatron.core.models.gpt import gpt_layer_specs

    from shardwise.engines.megatron import engine, model

    into: set[Call] = set()
    mesh = build_mesh(parse_layout("dp1", 1), CPU)
    local = gpt_layer_specs.get_gpt_layer_local_spec
    config = model.transformer_config(LLAMA, mesh, precision_of("bf16", CPU))
    nothing = {"model_parallel_cuda_manual_seed": lambda *_, **__: None}
    te = {"get_gpt_layer_with_transformer_engine_spec": lambda **keys: local(**keys)}
    with (
        watching(into, **nothing, **te),
        mock.patch.object(gpt_layer_specs, "TENorm", model.Norm, create=True),
    ):
        model.block_spec(LLAMA, config, mesh, 1, te=True)
        engine.set_up_trackers(7, mesh)
    return into


@pytest.fixture(scope="module")
def calls(ranks: RankPool) -> set[Call]:
    found: set[Call] = set()
    for layout, scalar in (("tp2", True), ("tp2.sp", True), ("pp2", False)):
        found |= set().union(*ranks.run(on_rank, layout, scalar, world=2))
    found |= set().union(*ranks.run(on_rank, "dp2.zero1", False, 0.0, world=2))
    found |= set().union(*ranks.run(on_rank, "pp2.v2.interleaved", False, world=2))
    return found.union(*ranks.run(gpu_calls, world=1))


def test_every_call_is_made(calls: set[Call]) -> None:
    assert {name for name, *_ in calls} == set(PLACES)


@pytest.mark.parametrize("version", versions(LIBRARY))
def test_released_versions_accept_every_call(calls: set[Call], version: str) -> None:
    for call, positional, keywords in sorted(calls):
        accepted = signature(LIBRARY, f"{ROOT}.{call}", version)
        if "kwargs" in accepted.parameters and SPECS in call:  # it hands all of it on
            name = call.removesuffix("_spec") + "_submodules"
            accepted = signature(LIBRARY, f"{ROOT}.{name}", version)
        accepted.bind(*[torch] * positional, **dict.fromkeys(keywords, torch))
