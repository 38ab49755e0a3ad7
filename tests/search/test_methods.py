"""Methods of search in a world of known answers."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError, DataError
from shardwise.search import methods
from shardwise.search.config import BeamConfig, BestOfNConfig, DvtsConfig, MctsConfig
from shardwise.search.driver import search, total_cost
from shardwise.search.tree import ROOT, Node, Tree, back_up, from_record, set_priors, walk
from tests.search import fake

METHODS: dict[str, Any] = {
    "best_of_n": BestOfNConfig(samples=9),
    "beam": BeamConfig(samples=8, width=4),
    "dvts": DvtsConfig(samples=8, width=4),
    "uct": MctsConfig(simulations=40, expand=3, select="uct"),
    "puct": MctsConfig(simulations=40, expand=3, backup="max"),
    "wide": MctsConfig(simulations=40, expand=2, widen=0.5),
}
EACH = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
methods_ = st.sampled_from(list(METHODS.values()))


def whole(trees: list[Tree]) -> list[dict[str, Any]]:
    return [t.record() for t in trees]


@EACH
def test_the_cost_is_what_the_engine_counts(config: Any) -> None:
    engine = fake.FakeEngine()
    found = fake.search(config, trees=[fake.tree(i) for i in range(4)], engine=engine)
    cost = total_cost(found)
    counts = engine.counts
    assert cost[:3] == (counts.computed, counts.drawn, counts.shared)
    for one in found:
        assert one.cost.drawn == sum(len(n.token_ids) for n in one.nodes)
        assert one.cost.scored > 0
        assert one.answer is not None and one.nodes[one.answer].reason == "stop"
        assert {n.policy for n in one.nodes[1:]} == {"fake"}


def test_a_tree_costs_its_distinct_tokens() -> None:
    """Nothing that stands in a cache goes through the model again: 64 leaves, one prompt."""
    engine, tree = fake.FakeEngine(depth=3, width=6), fake.tree()
    tree.prompt_tokens = [fake.PROMPT] * 50
    fake.search(MctsConfig(simulations=100, expand=4), trees=[tree], engine=engine)
    inner = {n.parent for n in tree.nodes} - {None, ROOT}
    drawn = sum(len(n.token_ids) for n in tree.nodes)
    assert tree.cost.computed == 50 + drawn - (len(tree.nodes) - 1) + len(inner)
    assert engine.most_spent == 0


@given(config=methods_, slots=st.integers(1, 40), concurrent=st.integers(1, 5))
def test_no_result_depends_on_company(config: Any, slots: int, concurrent: int) -> None:
    alone = [t for i in range(5) for t in fake.search(config, trees=[fake.tree(i)])]
    engine = fake.FakeEngine(slots=slots)
    together = fake.search(
        config, trees=[fake.tree(i) for i in range(5)], engine=engine, concurrent=concurrent
    )
    assert whole(together) == whole(alone)
    other = fake.search(config, trees=[fake.tree(0)], seed=1)
    assert whole(other) != whole(alone[:1])


def test_problems_draw_apart() -> None:
    """The same prompt, twice in a data set, is answered in two ways."""
    trees = [fake.tree(0), fake.tree(0)]
    trees[1].prompt_id = 1
    first, second = fake.search(METHODS["best_of_n"], trees=trees)
    assert [n.text for n in first.nodes] != [n.text for n in second.nodes]


@given(config=methods_, budget=st.integers(1, 300), samples=st.sampled_from([0, 2]))
def test_a_budget_holds(config: Any, budget: int, samples: int) -> None:
    bounded = config.model_copy(update={"budget_tokens": budget})
    scorer = fake.FakeScorer(samples=samples)
    [tree] = fake.search(bounded, scorer=scorer)
    assert 0 < tree.cost.drawn <= budget
    [free] = fake.search(config, scorer=fake.FakeScorer(samples=samples))
    if budget > 30 * free.cost.drawn:
        assert tree.record() == free.record()


@EACH
def test_a_large_budget_changes_nothing(config: Any) -> None:
    bounded = config.model_copy(update={"budget_tokens": 10**9})
    assert whole(fake.search(bounded)) == whole(fake.search(config))


def test_scores_are_asked_for_in_batches() -> None:
    scorer, trees = fake.FakeScorer(), [fake.tree(i) for i in range(8)]
    fake.search(METHODS["beam"], trees=trees, scorer=scorer)
    assert scorer.calls == 4  # one a step of the answers for all problems, one for repeated answers


@EACH
def test_records_are_exact(config: Any) -> None:
    [tree] = fake.search(config, scorer=fake.FakeScorer(lambda p: None if "c" in p.text else 0.1))
    again = from_record(json.loads(json.dumps(tree.record())))
    assert again == tree


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("nodes"),
        lambda r: r["nodes"][1].update(parent=1),
        lambda r: r["nodes"][1].update(id=5),
        lambda r: r["nodes"][0].update(strange=1),
    ],
)
def test_no_record(change: Any) -> None:
    [tree] = fake.search(METHODS["beam"])
    record = copy.deepcopy(tree.record())
    change(record)
    with pytest.raises(DataError, match="no record of a search tree"):
        from_record(record)


# Best of N


def test_best_of_n_goes_on_with_what_the_budget_cut() -> None:
    """An answer has 6 tokens; 9 of them share 40 tokens unevenly, in rounds."""
    [tree] = fake.search(BestOfNConfig(samples=9, budget_tokens=40))
    assert tree.cost.drawn == 40
    cut = [n for n in tree.nodes if n.reason == "cut"]
    assert len(tree.children(ROOT)) == 9 and len(cut) >= 9
    [enough] = fake.search(BestOfNConfig(samples=9, budget_tokens=60))
    [free] = fake.search(BestOfNConfig(samples=9))
    assert enough.record() == free.record()
    assert len(free.finished()) == 9 and free.cost.drawn == 54


# Beam and DVTS


def expanded(tree: Tree) -> list[int]:
    return sorted({n.parent for n in tree.nodes if n.parent})


def test_beam_takes_the_best_of_all() -> None:
    [tree] = fake.search(BeamConfig(samples=8, width=4))
    by_depth: dict[int, list[Node]] = {}
    for depth, node in walk(tree):
        by_depth.setdefault(depth, []).append(node)
    for nodes in list(by_depth.values())[1:-1]:
        seen = {}
        for n in nodes:
            seen.setdefault((n.parent, tuple(n.token_ids)), n)
        best = sorted(seen.values(), key=lambda n: -(n.scores["fake"] or 0))[:2]
        assert sorted(n.id for n in best) == [n.id for n in nodes if tree.children(n.id)]
        assert all(len(tree.children(n.id)) in (0, 4) for n in nodes)
    assert tree.answer is not None
    assert tree.nodes[tree.answer].scores["fake"] == max(
        tree.nodes[i].scores["fake"] or 0 for i in tree.finished()
    )


def test_dvts_subtrees_do_not_mix() -> None:
    """Each goes on with its own best step, also where another's second is better."""
    trees = [fake.tree(i) for i in range(5)]
    for tree in fake.search(DvtsConfig(samples=12, width=3), trees=trees):
        first = tree.children(ROOT)
        assert len(first) == 12
        for k in range(4):
            group = first[k::4]
            on = [i for i in group if tree.children(i)]
            assert len(on) == 1
            scores = [tree.nodes[i].scores.get("fake", 0.0) or 0.0 for i in group]
            assert on[0] == group[scores.index(max(scores))]
            below = tree.children(on[0])  # and so below it
            assert len(below) == 3 and sum(bool(tree.children(j)) for j in below) == 1
        assert len(tree.finished()) == 12


# MCTS


def test_backup_takes_the_new_value_in() -> None:
    """By hand, with values that differ: a stale one shows in the mean and in the maximum."""
    for how, expected in (("mean", [0.5, 0.75, 0.0]), ("max", [1.0, 1.0, 0.0])):
        tree = fake.tree()
        tree.nodes += [Node(1, 0, [0]), Node(2, 1, [1]), Node(3, 1, [2])]
        for node, value in ((1, 0.5), (2, 1.0), (3, 0.0)):
            back_up(tree, node, value, how)
        assert [n.visits for n in tree.nodes] == [3, 3, 1, 1]
        value = 0.5 if how == "mean" else 1.0
        assert [n.value for n in tree.nodes] == [value, value, 1.0, 0.0], expected


@given(
    select=st.sampled_from(["uct", "puct"]),
    backup=st.sampled_from(["mean", "max"]),
    simulations=st.integers(1, 80),
    expand=st.integers(1, 5),
    problem=st.integers(0, 5),
    samples=st.sampled_from([0, 3]),
)
def test_counts_add_up(
    select: Any, backup: Any, simulations: int, expand: int, problem: int, samples: int
) -> None:
    config = MctsConfig(simulations=simulations, expand=expand, select=select, backup=backup)
    scorer = fake.FakeScorer(samples=samples)
    [tree] = fake.search(config, trees=[fake.tree(problem)], scorer=scorer)
    assert tree.nodes[ROOT].visits == simulations
    for node in tree.nodes:
        children = [tree.nodes[i] for i in tree.children(node.id)]
        own = [node.scores.get("fake") or 0.0] * (node.visits - sum(c.visits for c in children))
        if not node.visits:
            assert not children
            continue
        below = [c for c in children if c.visits]
        if node.id == ROOT:
            assert not own
        else:
            assert len(own) == 1 or not children
        if children:
            assert sum(c.prior for c in children) == pytest.approx(1.0)
        if backup == "max":
            assert node.value == max([*own, *(c.value for c in below)])
        else:
            total = sum(own) + sum(c.value * c.visits for c in below)
            assert node.value == pytest.approx(total / node.visits)


@pytest.mark.parametrize("select", ["uct", "puct"])
@pytest.mark.parametrize("backup", ["mean", "max"])
def test_mcts_finds_the_best_leaf(select: Any, backup: Any) -> None:
    """One of 125 answers is right, and steps tell how near they are to it."""
    for problem in range(6):
        config = MctsConfig(
            simulations=200, expand=12, select=select, backup=backup, exploration=0.5
        )
        engine = fake.FakeEngine(depth=3, width=5)
        [tree] = fake.search(config, trees=[fake.tree(problem)], engine=engine)
        assert tree.answer is not None
        assert tree.text(tree.answer) == "b\nb\nb"
        assert tree.cost.drawn < 125 * 6


def test_a_walk_prefers_what_is_good_then_what_is_unknown() -> None:
    tree = fake.tree()
    tree.nodes += [Node(1, 0, [0], [-1.0]), Node(2, 0, [1], [-2.0]), Node(3, 0, [1], [-2.0])]
    assert set_priors(tree, [1, 2, 3]) == [1, 2]  # 3 says what 2 says
    assert tree.nodes[1].prior == pytest.approx(0.731, abs=1e-3) and tree.nodes[3].prior == 0
    for node, value in ((1, 1.0), (2, 0.0), (1, 0.5)):
        back_up(tree, node, value, "mean")
    # Visits 3, 2, 1; values 0.5, 0.75, 0: by hand, with c = 2.
    by = {
        "uct": (0.75 + 2 * (1.0986 / 2) ** 0.5, 0 + 2 * 1.0986**0.5),
        "puct": (0.75 + 2 * 0.7311 * 3**0.5 / 3, 0 + 2 * 0.2689 * 3**0.5 / 2),
    }
    for select, expected in by.items():
        config = MctsConfig(select=select, exploration=2.0)  # type: ignore[arg-type]
        value = methods.selection(tree, tree.nodes[ROOT], config)
        assert (value(1), value(2)) == pytest.approx(expected, abs=1e-3)


@given(first=st.integers(1, 30), more=st.integers(1, 30), select=st.sampled_from(["uct", "puct"]))
def test_mcts_goes_on_from_a_record(first: int, more: int, select: Any) -> None:
    """Stopped, written, read and gone on with: the tree of one go, its visits too."""
    config = MctsConfig(simulations=first, expand=3, select=select)
    longer = config.model_copy(update={"simulations": first + more})
    [part] = fake.search(config)
    [resumed] = fake.search(longer, trees=[from_record(json.loads(json.dumps(part.record())))])
    [straight] = fake.search(longer)
    for tree in (resumed, straight):  # finished answers are scored at the end of each go
        for n in tree.nodes:
            n.scores = {k: v for k, v in n.scores.items() if n.visits}
    assert resumed.nodes == straight.nodes
    assert resumed.cost.drawn == straight.cost.drawn


# Without a scorer, and steps


@EACH
def test_a_scorer_is_needed(config: Any) -> None:
    asked = fake.FakeEngine(), fake.policy(), config, None, [fake.tree()]
    if config.kind == "best_of_n":
        [tree] = search(*asked)
        assert tree.answer is None and len(tree.finished()) == 9
    else:
        with pytest.raises(ConfigError, match="needs a scorer"):
            search(*asked)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, {"step", "stop"}),
        ({"policy": fake.policy(max_step_tokens=1)}, {"cut", "stop", "step"}),
        ({"policy": fake.policy(max_depth=2)}, {"step", "depth"}),
        ({"policy": fake.policy(max_new_tokens=3)}, {"step", "length"}),
    ],
    ids=["whole", "cut", "depth", "length"],
)
def test_where_steps_end(options: dict[str, Any], reasons: set[str]) -> None:
    [tree] = fake.search(METHODS["beam"], **options)
    assert {n.reason for n in tree.nodes[1:]} == reasons
    for n in tree.nodes[1:]:
        assert n.terminal == (n.reason not in ("step", "cut"))
        assert not (n.terminal and tree.children(n.id))
    if "stop" not in reasons:
        assert tree.answer is None


def test_rollouts_are_counted_and_value_a_step() -> None:
    """A step's value is the mean of answers drawn from it, by draws of their own."""
    scorer = fake.FakeScorer(samples=5)
    [tree] = fake.search(METHODS["beam"], scorer=scorer)
    steps = [n for n in tree.nodes if n.scores and not n.terminal]
    assert steps
    for node in steps:  # a mean of five shares of three letters
        assert (node.scores["fake"] or 0.0) * 15 == pytest.approx(
            round((node.scores["fake"] or 0.0) * 15)
        )
    nodes = sum(len(n.token_ids) for n in tree.nodes)
    rollouts = sum(5 * 2 * (3 - tree.depth(n.id)) for n in steps)
    assert tree.cost.drawn == nodes + rollouts


# A score that is enough


@EACH
def test_a_score_that_is_enough_ends_a_search(config: Any) -> None:
    """The draws are those of a search that goes on, up to the first finished answer with it."""
    scorer = fake.FakeScorer(lambda p: p.text.count("b") / 3)
    until = config.model_copy(update={"stop_at": 2 / 3})
    [whole_], [tree] = fake.search(config, scorer=scorer), fake.search(until, scorer=scorer)
    assert tree.answer is not None and (tree.nodes[tree.answer].scores["fake"] or 0) >= 2 / 3
    assert tree.cost.drawn <= whole_.cost.drawn
    found = {tuple(whole_.tokens(n.id)) for n in whole_.nodes}
    assert {tuple(tree.tokens(n.id)) for n in tree.nodes} <= found
    if config.kind == "best_of_n":
        enough = [(n.scores["fake"] or 0) >= 2 / 3 for n in tree.nodes[1:]]
        assert enough.index(True) == len(enough) - 1 < 8


@given(config=methods_, budget=st.integers(1, 200))
def test_a_score_that_none_has_changes_no_draw(config: Any, budget: int) -> None:
    bounded = config.model_copy(update={"budget_tokens": budget})
    [tree] = fake.search(bounded.model_copy(update={"stop_at": 2.0}))
    assert tree.cost.drawn <= budget
    if config.kind != "best_of_n":  # which draws one after the other
        assert tree.nodes == fake.search(bounded)[0].nodes
    [free] = fake.search(config.model_copy(update={"stop_at": 2.0}))
    assert free.record() == fake.search(config)[0].record() or config.kind == "best_of_n"


def test_what_is_visited_often_is_widened() -> None:
    config = MctsConfig(simulations=60, expand=2, widen=0.5)
    [tree] = fake.search(config, engine=fake.FakeEngine(depth=2, width=6))
    for n in tree.nodes:
        if tree.children(n.id):  # as many as it had visits for when it was last walked through
            before = max(n.visits - 1, 1)
            assert math.ceil(2 * before**0.5) >= len(tree.children(n.id)) >= 2
    assert len(tree.children(ROOT)) == math.ceil(2 * 59**0.5)
    kept = [tree.nodes[i] for i in tree.children(ROOT) if tree.nodes[i].prior > 0]
    assert len({tuple(n.token_ids) for n in kept}) == len(kept) <= 6
    assert sum(n.prior for n in kept) == pytest.approx(1.0)
    [narrow] = fake.search(config.model_copy(update={"widen": 0.0}))
    assert len(narrow.children(ROOT)) == 2
