"""Searches with a real model: an engine with a cache finds what one without a cache finds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shardwise.rewards import Problem
from shardwise.rollout.config import Sampling
from shardwise.search.config import BeamConfig, BestOfNConfig, DvtsConfig, MctsConfig, StepsConfig
from shardwise.search.driver import Policy, search, total_cost
from shardwise.search.tree import ROOT, Tree
from tests.rollout import support
from tests.rollout.oracle import Oracle
from tests.search.fake import FakeScorer

STOPS = tuple(range(5))
METHODS: dict[str, Any] = {
    "best_of_n": BestOfNConfig(samples=4),
    "beam": BeamConfig(samples=4, width=2),
    "dvts": DvtsConfig(samples=4, width=2),
    "mcts": MctsConfig(simulations=8, expand=2),
}


def decode(ids: list[int]) -> str:
    """A token of 20 in 101 ends a step."""
    return "".join("\n" if t % 5 == 2 else f" {t}" for t in ids)


def grown(engine: Any, config: Any, numbers: list[int]) -> list[Tree]:
    sampling = Sampling(max_new_tokens=24, stop_ids=STOPS, temperature=1.5)
    policy = Policy(sampling, StepsConfig(max_step_tokens=8, max_depth=4), 64, decode)
    scorer = FakeScorer(lambda p: sum(p.token_ids) / len(p.token_ids) / 101)
    trees = [Tree(Problem(str(i), "", "", {}), i, [], [i + 1] * (1 + 3 * i)) for i in numbers]
    return search(engine, policy, config, scorer, trees, seed=3)


def oracle() -> Oracle:
    made = Oracle(support.CONFIGS["llama"], decode_text=decode)
    made.update_weights(support.hf_weights("llama"))
    return made


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_trees_of_a_model(config: Any) -> None:
    engine = oracle()
    together = grown(engine, config, [0, 1, 2])
    assert not engine.held and not engine.flying
    assert [grown(oracle(), config, [i])[0].record() for i in (0, 1, 2)] == [
        t.record() for t in together
    ]
    reasons = {n.reason for t in together for n in t.nodes}
    assert "stop" in reasons and ("step" in reasons or config.kind == "best_of_n")
    for tree in together:
        for node in tree.nodes[1:]:
            assert len(node.logprobs) == len(node.token_ids) > 0
            assert node.policy == engine.checksum
            ended = node.token_ids[-1] in STOPS
            assert (node.reason == "stop") == ended
            assert (node.reason == "step") <= ("\n" in node.text)
        assert tree.nodes[ROOT].token_ids == []


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("accelerate", [False, True], ids=["plain", "native"])
def test_a_cache_changes_nothing_but_the_cost(config: Any, accelerate: bool) -> None:
    """Pages that forks share hold what recomputation gives."""
    engine = support.generator("llama", decode_text=decode, accelerate=accelerate)
    before = dataclasses.replace(engine.counts)
    found, expected = grown(engine, config, [0, 1, 2]), grown(oracle(), config, [0, 1, 2])
    for a, b in zip(found, expected, strict=True):
        assert [n.token_ids for n in a.nodes] == [n.token_ids for n in b.nodes]
        assert [n.reason for n in a.nodes] == [n.reason for n in b.nodes]
        assert (a.answer, a.cost) == (b.answer, b.cost)
        for n, m in zip(a.nodes, b.nodes):
            assert n.logprobs == pytest.approx(m.logprobs, abs=2e-5)
    counts = engine.counts
    grew = [counts.computed - before.computed, counts.drawn - before.drawn, counts.shared]
    cost = total_cost(found)
    assert grew == [cost.computed, cost.drawn, cost.shared]  # each distinct token once
