"""Each row of the table of refusals, with its key and its mend; and what no row refuses."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.trained import Trained
from shardwise.config.optimizers import AdamWConfig, LionConfig, SgdConfig
from shardwise.config.schema import Fp8Config
from shardwise.engines import megatron
from shardwise.engines.megatron import refusals
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.errors import ConfigError
from shardwise.models.common.spec import ModelSpec
from shardwise.models.dense.llama import LlamaConfig
from shardwise.parallel.layout import Layout
from tests.support import toy

LORA = Trained(adapter=LowRankConfig(kind="lora"))


def case(
    model: Any = None, layout: Layout | None = None, device: str = "cuda", **keys: Any
) -> refusals.Case:
    parts = {k: keys.pop(k) for k in ("optimizer", "trained") if k in keys}
    config = MegatronConfig(kind="megatron", **keys)
    return refusals.Case(model or toy.llama(), config, layout or Layout(), device, **parts)


class Capped(LlamaConfig):
    """Of a switch that megatron does not know."""

    @property
    def spec(self) -> ModelSpec:
        return dataclasses.replace(super().spec, logit_soft_cap=3.0)


OTHER = Capped(**toy.llama().model_dump())
REFUSED = [
    (case(OTHER), "model.family: llama computes logit_soft_cap"),
    (case(toy.llama(mlp_bias=True, qkv_bias=True)), "model.mlp_bias"),
    (case(device="cpu"), "cpu_shim: true"),
    (case(toy.gpt2(dropout=0.1)), "model.dropout"),
    (case(toy.llama(o_bias=True)), "model.o_bias"),
    (case(layout=Layout(dp=2, shard=2, zero=3)), "write dp2.zero1"),
    (case(layout=Layout(dp=4, shard=2, cp=2)), "write dp4.zero1.cp2.ring"),
    (case(layout=Layout(pp=2, schedule="zbv", virtual=2)), "1f1b, interleaved"),
    (case(layout=Layout(tp=4)), "num_kv_heads 2"),
    (case(toy.llama(ffn_size=49), Layout(tp=2)), "ffn_size 49"),
    (case(fp8=Fp8Config()), "engine.fp8"),
    (case(trained=LORA), "adapter: lora"),
    (case(optimizer=LionConfig(kind="lion")), "optimizer.kind: lion"),
]


@pytest.mark.parametrize("refused,words", REFUSED)
def test_each_row_refuses_with_its_key_and_its_mend(refused: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        refusals.check(refused)


@pytest.mark.parametrize(
    "allowed",
    [
        case(device="cpu", cpu_shim=True),
        case(toy.gpt2(dropout=0.0, attn_dropout=0.0, embed_dropout=0.0), Layout(tp=2, sp=True)),
        case(layout=Layout(dp=4, shard=2), optimizer=AdamWConfig()),
        case(
            layout=Layout(pp=2, virtual=2, schedule="interleaved"), optimizer=SgdConfig(kind="sgd")
        ),
        case(layout=Layout(cp=2, dp=2, shard=2)),
    ],
)
def test_what_megatron_can_compute_passes(allowed: Any) -> None:
    refusals.check(allowed)


def test_every_row_has_a_case() -> None:
    rows = {next(r for r in refusals.REFUSALS if r(c)) for c, _ in REFUSED}
    assert rows == set(refusals.REFUSALS)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"shardwise\[megatron\]"):
        megatron.build(cast(Any, None))
