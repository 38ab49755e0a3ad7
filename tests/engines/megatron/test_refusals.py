"""Each row of the table of refusals, with its key and its mend; and what no row refuses."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.trained import Trained
from shardwise.config.adapters import FreezeConfig
from shardwise.config.optimizers import (
    AdamConfig,
    AdamWConfig,
    LionConfig,
    ParameterGroup,
    SgdConfig,
)
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
    parts = {k: keys.pop(k) for k in ("trained", "everywhere") if k in keys}
    parts["optimizer"] = keys.pop("rule", None)
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
    (case(rule=LionConfig(kind="lion")), "optimizer.kind: lion"),
    (
        case(rule=SgdConfig(kind="sgd"), layout=Layout(dp=2, shard=2), optimizer="megatron"),
        "engine.optimizer: native",
    ),
]
ADAMW, SGD, DEALT_OUT = AdamWConfig(), SgdConfig(kind="sgd"), Layout(dp=2, shard=2)
SPLIT = AdamWConfig(groups=[ParameterGroup(match="*.attn.q.*", weight_decay=0.5)])
OF_CORE_OPTIMIZER = [
    (case(rule=ADAMW, precision="fp64"), "engine.precision: fp64"),
    (case(rule=ADAMW, trained=Trained(freeze=FreezeConfig(patterns=["embed.*"]))), "freeze"),
    (case(rule=ADAMW, everywhere=False), "a role on some ranks"),
    (case(rule=ADAMW, layout=Layout(dp=4, shard=2)), "all data ranks"),
    (case(rule=SGD, layout=DEALT_OUT), "dp2.zero0"),
    (case(rule=AdamConfig(kind="adam"), layout=Layout(cp=2)), "knows adamw alone"),
    (case(rule=SgdConfig(kind="sgd", nesterov=True)), "optimizer.nesterov"),
    (case(rule=AdamWConfig(fused="apex")), "optimizer.fused"),
    (case(rule=SPLIT), "layers.0.attn.q.weight, layers.0.attn.k.weight"),
    (case(rule=AdamWConfig(no_decay=["*.up.bias"])), "layers.0.mlp.up.bias"),
]


@pytest.mark.parametrize("refused,words", OF_CORE_OPTIMIZER)
def test_what_its_own_optimizer_cannot_is_ours_or_refused(refused: Any, words: str) -> None:
    refusals.check(refused)
    assert words in (refusals.of_core_optimizer(refused) or "")
    asked = refused.config.model_copy(update={"optimizer": "megatron"})
    with pytest.raises(ConfigError, match=r"write engine\.optimizer: native, or auto"):
        refusals.check(dataclasses.replace(refused, config=asked))


@pytest.mark.parametrize(
    "allowed",
    [
        case(rule=ADAMW, layout=DEALT_OUT, optimizer="megatron", precision="bf16"),
        case(rule=SGD, layout=Layout(dp=2, zero=0), optimizer="megatron", precision="fp16"),
        case(rule=AdamConfig(kind="adam"), layout=Layout(tp=2), optimizer="megatron"),
        case(layout=DEALT_OUT, optimizer="megatron"),
    ],
)
def test_what_its_own_optimizer_can_passes(allowed: Any) -> None:
    refusals.check(allowed)
    assert refusals.of_core_optimizer(allowed) is None


@pytest.mark.parametrize("refused,words", REFUSED)
def test_each_row_refuses_with_its_key_and_its_mend(refused: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        refusals.check(refused)


@pytest.mark.parametrize(
    "allowed",
    [
        case(device="cpu", cpu_shim=True),
        case(toy.gpt2(dropout=0.0, attn_dropout=0.0, embed_dropout=0.0), Layout(tp=2, sp=True)),
        case(layout=Layout(dp=4, shard=2), rule=AdamWConfig()),
        case(layout=Layout(pp=2, virtual=2, schedule="interleaved"), rule=SgdConfig(kind="sgd")),
        case(layout=Layout(cp=2, dp=2, shard=2)),
    ],
)
def test_what_megatron_can_compute_passes(allowed: Any) -> None:
    refusals.check(allowed)


def test_every_row_has_a_case() -> None:
    rows = {next(r for r in refusals.REFUSALS if r(c)) for c, _ in REFUSED}
    assert rows == set(refusals.REFUSALS)
    found = {next(r for r in refusals.OF_CORE_OPTIMIZER if r(c)) for c, _ in OF_CORE_OPTIMIZER}
    assert found == set(refusals.OF_CORE_OPTIMIZER)


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"shardwise\[megatron\]"):
        megatron.build(cast(Any, None))
