"""Bugs that are planted in a search, each of which a test of this folder must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shardwise.search.config import BeamConfig, DvtsConfig, MctsConfig
from tests.rewards import test_rules
from tests.search import test_extract, test_methods, test_scorers
from tests.verify.edits import Edit, applied

BEAM, DVTS, MCTS = (c() for c in (BeamConfig, DvtsConfig, MctsConfig))
BUGS: dict[str, tuple[Callable[[], Any], Edit]] = {
    "a stale value in backup": (
        test_methods.test_backup_takes_the_new_value_in,
        Edit("search/tree.py", "max(n.value, value)", "max(n.value, tree.nodes[node].value)"),
    ),
    "a backup that forgets the root": (
        test_methods.test_backup_takes_the_new_value_in,
        Edit("search/tree.py", "in [tree.nodes[ROOT], *tree.path(node)]", "in tree.path(node)"),
    ),
    "visit counts lost on resume": (
        lambda: test_methods.test_records_are_exact(MCTS),
        Edit("search/tree.py", "[Node(**n) for n", '[Node(**n | {"visits": 0}) for n'),
    ),
    "the minimum taken as the mean": (
        lambda: test_scorers.test_a_model_is_read_at_step_ends("min"),
        Edit("losses/steps.py", "float(chance_N.min())", "float(chance_N.mean())"),
    ),
    "a model read one token before a step's end": (
        lambda: test_scorers.test_a_model_is_read_at_step_ends("last"),
        Edit("search/scoring_models.py", "len(path.prompt_tokens) :,",
             "len(path.prompt_tokens) - 1 :,"),
    ),
    "a search that goes on behind what is enough": (
        lambda: test_methods.test_a_score_that_is_enough_ends_a_search(
            test_methods.METHODS["best_of_n"]
        ),
        Edit("search/methods.py", "worth(n, scorer) >= score for n", "worth(n, scorer) > 1 for n"),
    ),
    "a step judged before it is at its end": (
        lambda: test_rules.test_beginnings_of_numbers_games("8 - 5 = 4", True),
        Edit("rewards/rules.py", 'steps if answer else steps.rpartition(",")[0]', "steps"),
    ),
    "priors of the newest steps alone": (
        test_methods.test_what_is_visited_often_is_widened,
        Edit("search/methods.py", "set_priors(tree, tree.children(node))",
             "set_priors(tree, drawn)"),
    ),
    "subtrees of DVTS that mix": (
        test_methods.test_dvts_subtrees_do_not_mix,
        Edit("search/methods.py",
             "best = [i for group in groups for i in _top(tree, distinct(tree, group), 1, scorer)]",
             "best = _top(tree, drawn, sum(map(bool, groups)), scorer)"),
    ),
    "a beam of each parent's best": (
        test_methods.test_beam_takes_the_best_of_all,
        Edit("search/methods.py", "best = _top(tree, drawn, keep, scorer)",
             "best = [i for c in found for i in _top(tree, c, 1, scorer)]"),
    ),
    "a budget counted twice": (
        lambda: test_methods.test_the_cost_is_what_the_engine_counts(BEAM),
        Edit("search/driver.py", "drawn=drawn)", "drawn=2 * drawn)"),
    ),
    "a budget that each sequence has for itself": (
        test_methods.test_best_of_n_goes_on_with_what_the_budget_cut,
        Edit("search/driver.py", "left // number if number else 0", "left"),
    ),
    "draws that all problems share": (
        test_methods.test_problems_draw_apart,
        Edit("search/driver.py", '"search", tree.prompt_id)', '"search")'),
    ),
    "prefixes computed again": (
        test_methods.test_a_tree_costs_its_distinct_tokens,
        Edit("search/driver.py", "if node in search.held:", "if node < 0:"),
    ),
    "nodes held after they were expanded": (
        test_methods.test_a_tree_costs_its_distinct_tokens,
        Edit("search/driver.py", "        self._release(search, wish.nodes)\n", ""),
    ),
    "a pair with different prefixes": (
        test_extract.test_every_pair_is_of_its_fork,
        Edit("search/extract.py", "rejected = min(ends[worst],", "rejected = min(scored,"),
    ),
    "a step's label of the next node": (
        test_extract.test_steps_are_those_of_the_reader,
        Edit("search/extract.py", "path[max(place - 1, 0)].id",
             "path[min(place, len(path) - 1)].id"),
    ),
    "a solution cut one token before its steps end": (
        test_extract.test_nodes_of_a_solution_end_with_its_steps,
        Edit("search/extract.py", "encoded.answer[begin : end + 1]", "encoded.answer[begin:end]"),
    ),
    "unscorable taken as wrong": (
        test_scorers.test_what_cannot_be_scored_is_no_zero,
        Edit("search/scorers.py", "[s for s in scores if s is not None]",
             "[s or 0.0 for s in scores]"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_noticed(name: str) -> None:
    check, edit = BUGS[name]
    check()
    with applied([edit]), pytest.raises((AssertionError, KeyError, ExceptionGroup)):
        check()
