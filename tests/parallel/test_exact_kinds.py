"""What is swapped, cut or quantised must be exactly what its replacement computes."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.assemble import assemble
from shardwise.config.schema import NativeConfig
from shardwise.errors import ConfigError
from shardwise.models import families
from shardwise.models.common.blocks import Attention, RMSNorm, SwiGLU
from shardwise.models.dense.model import Dense as Llama
from shardwise.parallel.layout import parse_layout
from shardwise.parallel.mesh import build_mesh
from tests.support import toy
from tests.support.pool import RankPool


class OffsetNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class Gate(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Normed(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.softmax(self.up(x), -1))  # type: ignore[no-any-return]


class Doubled(Attention):
    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) * 2.0


def changed(path: str, kind: type[nn.Module]) -> type[Llama]:
    """A Llama with one module of layer 0 of another kind, its parameters the same."""

    class Changed(Llama):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.get_submodule(f"layers.0.{path}").__class__ = kind

    return Changed


def refusals(cases: list[tuple[str, str, type[nn.Module]]]) -> list[str]:
    found = []
    for layout, path, kind in cases:
        mesh = build_mesh(parse_layout(layout, dist.get_world_size()), torch.device("cpu"))
        engine = NativeConfig(layout=layout, precision="fp32", compile=False)
        row = dataclasses.replace(families.FAMILIES["llama"], model=changed(path, kind))
        with mock.patch.dict(families.FAMILIES, llama=row):
            try:
                assemble(toy.llama(num_layers=4), engine, mesh, 0)
                found.append("")
            except ConfigError as error:
                found.append(str(error))
    return found


def test_subclasses_are_refused_where_they_would_be_computed_otherwise(ranks: RankPool) -> None:
    cases: list[tuple[str, str, type[nn.Module]]] = [
        ("tp2", "attn_norm", OffsetNorm),
        ("tp2.sp", "mlp.gate", Gate),
        ("tp2", "mlp", Normed),
        ("tp2", "attn", Doubled),
        ("cp2", "attn", Doubled),
        ("pp2.zbv", "mlp.gate", Gate),
        ("dp2", "attn_norm", OffsetNorm),  # nothing is swapped
    ]
    [found, again] = ranks.run(refusals, cases, world=2)
    assert found[-1] == again[-1] == ""
    for (layout, path, kind), said, other in zip(cases[:-1], found, again):
        told = said or other  # the rank that holds layer 0
        assert "layers.0" in told, (layout, path, told)
        if layout != "cp2":
            assert f"layers.0.{path} is a {kind.__name__}" in told
