"""The head is applied to the tokens that a loss reads, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.config.schema import NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.contract import LossOutput, is_marked, reads_valid
from shardwise.losses.distill import DistillLoss
from shardwise.losses.logprobs import valid_logprobs
from shardwise.ops.logits import Logits
from tests.support import toy
from tests.support.daily import daily
from tests.support.engines import LR, assert_near, copies, engine
from tests.support.pool import RankPool

ROWS, TOKENS = 4, 9  # padded where a layout divides tokens by two or four
MODEL = toy.llama(num_layers=4)


class Unmarked(CausalLM):
    """The same, of which no engine knows what it reads."""

    def __call__(self, logits_BTV: Tensor | Logits, batch: MicroBatch) -> LossOutput:
        assert not isinstance(logits_BTV, Logits) or not logits_BTV.selects
        return super().__call__(logits_BTV, batch)


def unmarked(logits_BTV: Any, batch: MicroBatch) -> Tensor:
    return valid_logprobs(logits_BTV, batch)


def micro_batches(it: Engine) -> list[MicroBatch]:
    """A row each: one valid token, which another context rank lacks; none; some; all."""
    batch = toy.batch(ROWS, TOKENS)
    mask_BT = batch.loss_mask_BT.clone()
    mask_BT[1], mask_BT[3] = False, True
    whole = dataclasses.replace(batch, loss_mask_BT=mask_BT)
    return whole.split(ROWS // it.data_size)[it.data_rank].split(1)


def learn(layout: str, loss: CausalLM, read: Callable[..., Tensor]) -> dict[str, Any]:
    """One update and one pass; and of how many tokens the head's outputs were."""
    it = engine(NativeConfig(layout=layout, precision="fp64", compile=False), MODEL)
    sizes: list[int] = []

    def note(_: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes.append(output[..., 0].numel())

    for part in it.modules():
        if part.head is not None:
            part.head.register_forward_hook(note)  # type: ignore[union-attr]
    batches = micro_batches(it)
    metrics = it.forward_backward(batches, loss)
    out = {"metrics": metrics, "sizes": sizes[:], "gradients": copies(it, "grads")}
    it.step(LR)
    out["logprobs"] = it.forward(batches, read)
    out["valid"] = [valid_here(it, batch) for batch in batches]
    return out


def valid_here(it: Engine, batch: MicroBatch) -> int:
    """Of the tokens that this rank computes, those with loss."""
    index_t = it.share_of(batch).tokens_t
    return int(batch.loss_mask_BT[:, index_t[index_t < TOKENS]].sum())


LAYOUTS = [("dp1", 1), ("tp2.sp", 2), ("cp2", 2), ("pp2.zbv", 2)]
SLOW = [("dp2.zero3", 2), ("cp2.ulysses", 2), ("tp2.pp2", 4), ("cp2.tp2.sp", 4)]


@pytest.mark.parametrize("layout,world", daily([*LAYOUTS, *SLOW], *range(len(LAYOUTS))))
def test_tokens_without_loss_cost_no_logits(ranks: RankPool, layout: str, world: int) -> None:
    selected = ranks.run(learn, layout, CausalLM(accuracy=True), valid_logprobs, world=world)
    whole = ranks.run(learn, layout, Unmarked(accuracy=True), unmarked, world=world)
    for a, b in zip(selected, whole, strict=True):
        assert a["metrics"] == pytest.approx(b["metrics"], rel=1e-12)
        assert_near(a["gradients"], b["gradients"], 1e-12)
        for ours, theirs in zip(a["logprobs"], b["logprobs"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        assert a["sizes"] == a["valid"][: len(b["sizes"])] and min(b["sizes"], default=9) > 0
    assert any(found["sizes"] for found in selected)


def test_a_mark_is_a_functions_own() -> None:
    assert is_marked(CausalLM()) and is_marked(valid_logprobs)
    assert is_marked(DistillLoss.per_token) and is_marked(reads_valid(lambda logits, batch: logits))
    assert not is_marked(Unmarked()) and not is_marked(unmarked)
