"""What a micro-batch knows of its valid tokens."""

from __future__ import annotations

import dataclasses

import torch

from shardwise.data.batch import join
from tests.support import toy


def test_valid_tokens_follow_the_mask_wherever_a_batch_has_been() -> None:
    batch = toy.batch(4).to("cpu")
    emptied = dataclasses.replace(batch, loss_mask_BT=torch.zeros_like(batch.loss_mask_BT))
    assert emptied.valid().tolist() == []
    for part in (batch, join(batch.split(3)), *batch.split(1)):
        assert torch.equal(part.valid(), part.loss_mask_BT.flatten().nonzero().flatten())
