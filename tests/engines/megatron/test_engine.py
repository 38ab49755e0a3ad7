"""Every layout of the megatron engine computes what the plain engine computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.config.optimizers import OptimizerConfig, ParameterGroup, SgdConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Setup
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.plain import PlainEngine
from shardwise.engines.plain_config import PlainConfig
from shardwise.engines.registry import build_engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.contract import LossOutput
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops.logits import selected_values
from shardwise.parallel.layout import Layout, parse_layout
from shardwise.precision.policy import DtypeCheck, precision_of
from tests.support import toy
from tests.support.daily import daily
from tests.support.engines import CPU, LR, OPTIMIZER, STEPS, assert_near, copies
from tests.support.pool import RankPool

pytest.importorskip("megatron.core")

# Groups with decays of their own, which parts of one fused weight do not share.
GROUPS = [
    ParameterGroup(match="*.attn.q.*", weight_decay=0.5),
    ParameterGroup(match="*.up.*", lr=5e-3),
]
SGD = SgdConfig(kind="sgd", lr=LR, momentum=0.9, groups=GROUPS)


class Squares:
    """Of a scalar head's numbers."""

    weights: Mapping[str, float] = {"loss": 0.5}

    def counts(self, batch: MicroBatch) -> Mapping[str, Tensor]:
        return {"loss": batch.loss_mask_BT.sum()}

    def __call__(self, logits: Any, batch: MicroBatch) -> LossOutput:
        values_BT = selected_values(logits, batch.loss_mask_BT)
        return LossOutput({"loss": (values_BT - batch.loss_mask_BT * 1.0).square().sum()})


@dataclasses.dataclass(frozen=True)
class Case:
    layout: str
    model: Any
    precision: str = "fp64"
    cuts: tuple[int, ...] = (1,)  # micro-batches of each data rank
    optimizer: OptimizerConfig = OPTIMIZER
    packed: bool = False
    whose: Any = "auto"  # optimizer
    clip: float = 1.0
    recompute: Any = "none"


def megatron(case: Case) -> Engine:
    config = MegatronConfig(
        kind="megatron",
        layout=case.layout,
        precision=case.precision,
        cpu_shim=True,
        optimizer=case.whose,
        max_grad_norm=case.clip,
        recompute=case.recompute,
    )
    layout = parse_layout(case.layout, dist.get_world_size())
    return build_engine(Setup(case.model, config, layout, CPU, 7, "test", case.optimizer))


def plain(case: Case) -> PlainEngine:
    config = PlainConfig(kind="plain", precision=case.precision, max_grad_norm=case.clip)
    return PlainEngine(Setup(case.model, config, Layout(), CPU, 7, "test", case.optimizer))


def batch(case: Case, step: int) -> MicroBatch:
    """Eight rows; packed: of two documents each, whose positions start anew."""
    found = toy.batch(8, seed=step)
    if not case.packed:
        return found
    second_T = torch.arange(12) >= 5
    segments_BT = second_T.long().expand(8, -1).clone()
    positions_BT = found.position_ids_BT - 5 * segments_BT
    return dataclasses.replace(found, segment_ids_BT=segments_BT, position_ids_BT=positions_BT)


def train(it: Engine, case: Case) -> dict[str, Any]:
    """Three steps; metrics, gradients of the first, norms, and what is there at the end."""
    scalar = case.model.head == "scalar"
    loss = Squares() if scalar else CausalLM(accuracy=True)
    check = DtypeCheck(precision_of(case.precision, CPU).declared())
    out: dict[str, Any] = {"metrics": [], "norms": []}
    for step in range(STEPS):
        share = batch(case, step).split(8 // it.data_size)[it.data_rank]
        parts = case.cuts[it.data_rank] if it.data_size > 1 else case.cuts[0]
        out["metrics"].append(it.forward_backward(share.split(-(-share.num_rows // parts)), loss))
        check.note(it.dtypes())
        if step == 0:
            out["gradient"] = copies(it, "grads")
        out["norms"].append(it.step(LR))
    for kind in ("weights", *it.optimizer_states()):
        out[kind] = copies(it, kind)
    asked = batch(case, 9).split(5)
    read = (lambda x, b: selected_values(x, b.loss_mask_BT)) if scalar else valid_logprobs
    out["answers"] = torch.cat(it.forward(asked, read))
    out["hf"] = {n: t.clone() for n, t in it.weights()}
    out["dtypes"] = check.problems()
    out["kinds"] = it.optimizer_states()
    it.close()
    return out


def on_rank(case: Case) -> dict[str, Any]:
    return train(megatron(case), case)


def assert_same(mine: dict[str, Any], wanted: dict[str, Any], bound: float) -> None:
    # A key's bias has no gradient but rounding, since softmax ignores it.
    assert not [name for _, name in mine["dtypes"] if not name.endswith("attn.k.bias")]
    for a, b in zip(mine["metrics"], wanted["metrics"], strict=True):
        assert a == pytest.approx(b, rel=bound)
    assert mine["norms"] == pytest.approx(wanted["norms"], rel=bound)
    assert torch.allclose(mine["answers"], wanted["answers"], rtol=0, atol=bound * 10)
    assert mine["kinds"] == wanted["kinds"]
    for part in ("gradient", "weights", "hf", *wanted["kinds"]):
        assert mine[part].keys() == wanted[part].keys()
        assert_near(mine[part], wanted[part], bound, part)


LLAMA = toy.llama(num_layers=4, qk_norm=True, qkv_bias=True)
UNTIED = toy.llama(num_layers=3, tie_embeddings=False, head_dim=12, sliding_window=4)
SCALAR = toy.llama(hidden_size=33, head_dim=8, tie_embeddings=False, head="scalar")
GPT2 = toy.gpt2(dropout=0.0, attn_dropout=0.0, embed_dropout=0.0)
CASES = [
    Case("dp1", LLAMA, cuts=(3,)),
    Case("dp2.zero0", LLAMA, cuts=(2, 2)),
    Case("dp2.zero1", LLAMA, cuts=(1, 4), whose="native"),
    Case("tp2", LLAMA, cuts=(2,), whose="native"),
    Case("tp2.sp", LLAMA, cuts=(2,)),
    Case("pp2", LLAMA, cuts=(3,)),
    Case("pp2.v2.interleaved", LLAMA, cuts=(3,)),
    Case("cp2.ring", LLAMA, cuts=(2,)),
    Case("cp2.ulysses", LLAMA, cuts=(2,)),
    Case("tp2.sp", UNTIED, packed=True),
    Case("pp2", UNTIED, cuts=(2,), optimizer=SGD),
    Case("cp2.ring", UNTIED, packed=True),
    Case("tp2", SCALAR, recompute="full"),
    Case("tp2.sp", SCALAR),
    Case("tp2.sp", GPT2, cuts=(2,), optimizer=SGD),
    Case("pp2", GPT2, packed=True),
    Case("pp2.v2.interleaved", LLAMA, cuts=(3,), recompute="full"),
    Case("cp2.ring", UNTIED, packed=True, recompute="full"),
    Case("tp2.sp", LLAMA, cuts=(2,), recompute="full"),
]


def name_of(case: Case) -> str:
    words = case.packed * "packed" + (case.whose != "auto") * f"-{case.whose}-{case.precision}"
    words += (case.recompute != "none") * "-recompute"
    return f"{case.layout}-{case.model.family}-{case.model.head}-{case.optimizer.kind}{words}"


@pytest.mark.parametrize("case", daily(CASES, *range(1, 16, 2)), ids=map(name_of, CASES))
def test_layouts_equal_the_plain_engine(ranks: RankPool, case: Case) -> None:
    world = 1 if case.layout == "dp1" else 2
    wanted = train(plain(case), dataclasses.replace(case, cuts=(1,)))
    for mine in ranks.run(on_rank, case, world=world):
        assert_same(mine, wanted, 1e-9)


def kept_for_backward(case: Case) -> int:
    """Bytes of what autograd saves in an update."""
    it, found = megatron(case), dict[int, int]()

    def keep(value: Tensor) -> Tensor:
        found[value.data_ptr()] = value.nbytes
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        it.forward_backward([batch(case, 0)], CausalLM())
    it.close()
    return sum(found.values())


@pytest.mark.slow
def test_recompute_keeps_less(ranks: RankPool) -> None:
    case = Case("tp2", toy.llama(num_layers=8))
    [kept, _], [less, _] = (
        ranks.run(kept_for_backward, dataclasses.replace(case, recompute=asked), world=2)
        for asked in ("none", "full")
    )
    assert less < kept / 2, (less, kept)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2.tp2.sp", "tp2.pp2", "dp2.pp2.v2.interleaved", "dp2.cp2"])
def test_layouts_of_four_ranks_equal_the_plain_engine(ranks: RankPool, layout: str) -> None:
    case = Case(layout, LLAMA, cuts=(2, 2))
    wanted = train(plain(case), dataclasses.replace(case, cuts=(1,)))
    for mine in ranks.run(on_rank, case, world=4):
        assert_same(mine, wanted, 1e-9)


@pytest.mark.parametrize("precision,bound", [("fp32", 2e-5), ("bf16", 0.2)], ids=["fp32", "bf16"])
def test_narrow_precisions_come_near_and_keep_their_dtypes(
    ranks: RankPool, precision: str, bound: float
) -> None:
    case = Case("tp2.sp", UNTIED, precision, cuts=(2,))
    wanted = train(plain(case), dataclasses.replace(case, cuts=(1,)))
    for mine in ranks.run(on_rank, case, world=2):
        assert_same(mine, wanted, bound)
