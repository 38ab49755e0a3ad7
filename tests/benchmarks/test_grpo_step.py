"""Self-check of the GRPO benchmark: TRL and the stage agree on a replay, and disagreement is seen.

The race itself is run with a toy model.
"""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

import dataclasses

import grpo_step as bench
import rl

from tests.support.pool import RankPool


def test_agrees_then_races() -> None:
    result = bench.main(["--tiny", "--turns", "2", "--warmup", "1", "--threads", "1"])
    assert set(result["replay"]) == {"log-probabilities", "advantages", "gradient norm"}
    assert max(result["replay"].values()) < rl.TOLERANCE
    assert result["ratio"] > 0 and set(result["seconds"]) == {bench.OURS, bench.TRL}


def disagreements() -> list[float]:
    """The differences when TRL replays other weights, and when rewards are swapped."""
    length = 4
    stage = bench.our_stage(64, 1, length)
    trl = bench.TrlGrpo(**bench.trl_arguments(stage, length))
    groups = bench.stored_rollout(stage, length)
    ours = bench.our_replay(stage, groups)
    texts, completions, rewards = bench.as_lists(stage, groups)
    theirs = trl.replay(texts, completions, rewards[::-1])
    swapped = bench.agreement(ours, theirs)
    for p in trl.trainer.model.parameters():
        p.data.mul_(1.01)
    other = bench.agreement(ours, trl.replay(texts, completions, rewards))
    with pytest.raises(ValueError, match="prompt"):
        bench.agreement(dataclasses.replace(ours, prompt_ids=[]), theirs)
    return [swapped["advantages"], other["log-probabilities"], other["gradient norm"]]


def test_disagreement_is_seen(ranks: RankPool) -> None:
    [found] = ranks.run(disagreements, world=1)
    assert min(found) > rl.TOLERANCE
