"""A shared-prompt row computes what separate sequences compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.data.groups import collate_groups
from shardwise.errors import DataError
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.ops.cross_entropy import token_logprobs
from tests.support import toy

TOKENS = st.lists(st.integers(0, 60), min_size=1, max_size=5)
GROUPS = st.lists(
    st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    net = registry.build(toy.llama(sliding_window=4)).double()
    init_weights(net, 3)
    return net


@settings(max_examples=25, deadline=None)
@given(groups=GROUPS, multiple=st.sampled_from([1, 8]))
def test_branches_equal_separate_sequences(
    model: torch.nn.Module, groups: list[tuple[list[int], list[list[int]]]], multiple: int
) -> None:
    prompts, completions = zip(*groups, strict=True)
    scores = [
        [[float(10 * i + t) for t in range(len(c))] for i, c in enumerate(g)] for g in completions
    ]
    batch = collate_groups(
        prompts, completions, range(len(groups)), 0, pad_multiple=multiple, per_token={"s": scores}
    )
    assert batch.input_ids_BT.shape[1] % multiple == 0
    logits = model(batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT)
    together = token_logprobs(logits, batch.targets_BT)
    for b, (prompt, group) in enumerate(groups):
        mask = batch.loss_mask_BT[b]
        assert batch.targets_BT[b][mask].tolist() == [t for c in group for t in c]
        assert batch.extras["s"][b][mask].tolist() == [x for g in scores[b] for x in g]
        alone = []
        for completion in group:
            ids = torch.tensor([[*prompt, *completion]])
            out = model(ids[:, :-1], torch.arange(ids.shape[1] - 1)[None])
            alone.append(token_logprobs(out, ids[:, 1:])[0, len(prompt) - 1 :])
        torch.testing.assert_close(together[b][mask], torch.cat(alone), rtol=0, atol=1e-12)


def test_unkept_completions_carry_no_loss() -> None:
    batch = collate_groups([[1, 2]], [[[3], [4, 5]]], [0], 0, keep=[[False, True]])
    assert batch.targets_BT[batch.loss_mask_BT].tolist() == [4, 5]


def test_numbers_spread_over_their_completion() -> None:
    batch = collate_groups([[1]], [[[3], [4, 5]]], [0], 0, per_token={"a": [[2.0, -1.0]]})
    np.testing.assert_array_equal(batch.extras["a"][batch.loss_mask_BT].numpy(), [2.0, -1.0, -1.0])


@pytest.mark.parametrize("prompt,group", [([], [[1]]), ([1], [[]])])
def test_empty_parts_are_refused(prompt: list[int], group: list[list[int]]) -> None:
    with pytest.raises(DataError, match="at least one token"):
        collate_groups([prompt], [group], [0], 0)
