"""Verify over roles: layouts of all or of one, placements, and planted bugs of PPO."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwise.errors import UserError
from shardwise.verify import suite
from shardwise.verify.roles import parse, world_of
from shardwise.verify.verifier import Verifier
from tests.support.daily import daily
from tests.support.pool import RankPool
from tests.verify.ppo_bugs import PPO_BUGS, walk_with

ROLES = (
    "actor=tp2.sp",
    "critic=pp2.1f1b,actor=dp2.zero3",
    "actor=dp1.zero0@0-0,critic=dp1.zero0@1-1,reward=dp1.zero0@1-1",
    "actor=tp2@1-2,critic=dp2.zero2@2-3,reference=cp2.ring@0-1",
)
# What the first differing value must be.
FIRST = {
    "whitening_per_rank": "advantages",
    "gae_across_padding": "advantages",
    "reward_on_padding": "advantages",
    "kl_with_the_wrong_sign": "advantages",
    "reference_follows_the_actor": "forward pass",
    "old_logprobs_taken_after_the_first_update": "loss or metric",
    "value_clip_dropped": "loss",
    "values_of_the_critic_one_rollout_ago": "values",
    "critic_skips_an_update_on_its_own_rank": "weight",
    "advantages_of_another_completion": "advantages",
    "truncated_completions_scored_like_whole_ones": "advantages",
}


@pytest.fixture(scope="module")
def verifier(ranks: RankPool) -> Iterator[Verifier]:
    made = Verifier(suite.recipe("llama"), ranks)
    yield made
    made.close()


@pytest.mark.parametrize("layout", daily(ROLES, 2))
def test_layouts_and_placements_of_roles(verifier: Verifier, layout: str) -> None:
    verdict = verifier.check("ppo", layout)
    assert verdict.passed, verdict.sentence()
    assert {"values", "advantages", "returns", "gradient", "loss"} <= verdict.worst.keys()


@pytest.mark.slow
def test_the_whole_path_of_roles_that_share_no_rank(ranks: RankPool) -> None:
    """The first rank is outside of the actor."""
    whole = Verifier(suite.recipe("llama"), ranks, whole=True)
    verdict = whole.check("ppo", "critic=dp1@0,actor=dp1@1")
    whole.close()
    assert verdict.passed, verdict.sentence()


# Others are edits of the source (`test_edited_bugs`).
DAILY = ("critic_skips_an_update_on_its_own_rank",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in DAILY else [pytest.mark.slow]) for n in PPO_BUGS]
)
def test_planted_bug_is_caught(name: str, verifier: Verifier, ranks: RankPool) -> None:
    bug = PPO_BUGS[name]
    small = verifier.small("ppo", bug.layout)
    task = verifier.task(small, bug.layout, "fp64")
    found = ranks.run(walk_with, name, task, world=world_of(bug.layout))
    wrong = [d for d in verifier.judge(small, bug.layout, "fp64", found) if d.is_bug]
    assert wrong[0].kind in FIRST[name].split(" or "), wrong[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted({b.layout for b in PPO_BUGS.values()} - set(ROLES)))
def test_the_sound_code_is_not_flagged(verifier: Verifier, layout: str) -> None:
    verdict = verifier.check("ppo", layout)
    assert verdict.passed, verdict.sentence()


def test_grammar() -> None:
    assert world_of("actor=tp2@1-2,critic=dp2.zero2@2-3") == 4
    assert world_of("dp2.zero2.tp2") == 4
    assert [str(p) for p in parse("actor=tp2@0-1,critic=pp2")] == ["actor=tp2@0-1", "critic=pp2"]
    for text, words in (("actor=", "no role's layout"), ("actor=tp2@0-2", "needs 2 ranks")):
        with pytest.raises(UserError, match=words):
            parse(text)
