"""One rank's mixed precision is FSDP2's, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.config.schema import AdamWConfig, NativeConfig
from shardwise.engines.native import NativeEngine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.logprobs import valid_logprobs
from shardwise.parallel import data
from shardwise.parallel.layout import parse_layout, world_of
from shardwise.parallel.mesh import Mesh, build_mesh
from shardwise.parallel.mixed_precision import ComputeCopies
from tests.support import toy
from tests.support.daily import daily
from tests.support.pool import RankPool


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def engine(**config: Any) -> NativeEngine:
    mesh = build_mesh(parse_layout("dp1", 1), torch.device("cpu"))
    settings = NativeConfig.model_validate({"precision": "bf16", "compile": False, **config})
    return NativeEngine(toy.llama(), settings, mesh, seed=7, optimizer=AdamWConfig(lr=1e-2))


def distinct(seed: int) -> Tensor:
    """[8, 12] tokens, none of them twice in four rows: FSDP2 would sum its gradients in bf16."""
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(61, generator=generator)[:48].view(4, 12) for _ in range(2)]
    return torch.cat(halves)


def train(
    config: dict[str, Any], fsdp: bool, layout: str = "dp1"
) -> tuple[list[Any], dict[str, Tensor], bool]:
    """Metrics and norms of three steps of two micro-batches, the state, whether FSDP2 was used."""
    # FSDP2 runs at any group size; `Mesh.alone` decides.
    world = mock.patch.object(Mesh, "alone", False) if fsdp else mock.patch.dict({})
    log: list[Any] = []
    mesh = build_mesh(parse_layout(layout, world_of(layout)), torch.device("cpu"))
    settings = NativeConfig.model_validate({"precision": "bf16", "compile": False, **config})
    # A tied head's product may be left for later: summed in fp32 with the embedding's gradient,
    # where FSDP2 sums the two in bf16.
    model = toy.llama(num_layers=4, tie_embeddings="tp" not in layout)
    with world:
        it = NativeEngine(model, settings, mesh, seed=7, optimizer=AdamWConfig(lr=1e-2))
        for step in range(3):
            batch = dataclasses.replace(toy.batch(8, seed=step), input_ids_BT=distinct(step))
            log.append(it.forward_backward(batch.split(2), CausalLM()))
            found = it.forward(batch.split(2), lambda z, b: valid_logprobs(z, b))
            log.append([float(logprobs_BT.sum()) for logprobs_BT in found])
            log.append(it.step(1e-2))
        state = {n: local(t) for n, t in it.state_dict().tensors.items()}
        return log, state, any(data.fsdp_modules(chunk) for chunk in it.chunks.values())


@pytest.mark.parametrize(
    "config", [{}, {"recompute": "full"}, {"precision": "fp32"}, {"precision": "fp64"}]
)
def test_equals_fsdp_bitwise(ranks: RankPool, config: dict[str, Any]) -> None:
    [(log, state, wrapped)] = ranks.run(train, config, False, world=1)
    [(log_fsdp, state_fsdp, wrapped_fsdp)] = ranks.run(train, config, True, world=1)
    assert (wrapped, wrapped_fsdp) == (False, True)
    assert log == log_fsdp
    assert state.keys() == state_fsdp.keys()
    for name, value in state.items():
        assert torch.equal(value, state_fsdp[name]), name


@pytest.mark.parametrize(
    ("precision", "layout"),
    daily(
        itertools.product(("bf16", "fp32"), ("tp2.sp", "pp2", "pp2.zbv", "pp2.interleaved.v2")),
        *(2, 3, 5),
    ),
)
def test_equals_fsdp_on_layouts_without_data_ranks(
    ranks: RankPool, layout: str, precision: str
) -> None:
    found = ranks.run(train, {"precision": precision}, False, layout, world=2)
    expected = ranks.run(train, {"precision": precision}, True, layout, world=2)
    for (log, state, wrapped), (log_fsdp, state_fsdp, wrapped_fsdp) in zip(
        found, expected, strict=True
    ):
        assert (wrapped, wrapped_fsdp) == (False, True)
        assert log == log_fsdp
        for name, value in state_fsdp.items():
            assert torch.equal(state[name], value), name


def repeated_token(times: int) -> Tensor:
    """The gradient of a bf16 embedding after two micro-batches that use token 1 so many times."""
    model = nn.Embedding(3, 2)
    copies = ComputeCopies(model, torch.bfloat16)
    for _ in range(2):
        model(torch.full((1, times), 1)).sum().backward()
    copies.masters()
    assert model.weight.grad is not None and not model.weight.grad.is_sparse
    return model.weight.grad


def test_uses_of_a_token_are_summed_in_the_masters_precision() -> None:
    gradient = repeated_token(1001)  # which bf16 does not hold
    assert gradient.tolist() == [[0.0, 0.0], [2002.0, 2002.0], [0.0, 0.0]]


def masters_come_back() -> None:
    it = engine()
    names = [n for n, _ in it.model.named_parameters()]
    first = it.model.head.weight
    it.forward([toy.batch(2)], lambda z, b: None)
    assert it.model.head.weight.dtype == torch.bfloat16
    assert it.model.head.weight is it.model.embed.weight  # tied, as the masters are
    assert [n for n, _ in it.model.named_parameters()] == names
    state = it.state_dict().tensors
    assert {t.dtype for n, t in state.items() if n.startswith("model.")} == {torch.float32}
    assert it.model.head.weight is first
    # What is written into the state is what the next forward pass computes with.
    before = it.forward([toy.batch(2)], lambda z, b: z.clone())[0]
    with torch.no_grad():
        it.state_dict().tensors["model.embed.weight"].mul_(2.0)
    after = it.forward([toy.batch(2)], lambda z, b: z.clone())[0]
    assert not torch.equal(before, after)


def test_masters_come_back(ranks: RankPool) -> None:
    ranks.run(masters_come_back, world=1)
