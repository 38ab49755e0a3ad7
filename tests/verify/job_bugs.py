"""Bugs to plant as edits of the source in jobs that make data: what ranks do, one process does not.

None is in what verify holds ranks against: one process on the plain engine, which draws without a
cache, in one go. What jobs make of what was drawn has its planted bugs in the rooms' own tests
(``tests/search/test_bugs.py``).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tests.verify.edits import Edit

NO_ROWS = [{"path": "no.jsonl"}]  # others stand in for them
MCTS: dict[str, Any] = {
    "kind": "search",
    "method": {"kind": "mcts", "simulations": 4, "expand": 2},
    "scorer": {"kind": "rollouts", "samples": 2},
    "num_problems": 4,
}
BEAM = {**MCTS, "method": {"kind": "beam", "samples": 4, "width": 2}}
DVTS = {**MCTS, "method": {"kind": "dvts", "samples": 4, "width": 2}}
BEST: dict[str, Any] = {
    "kind": "search",
    "method": {"kind": "best_of_n", "samples": 3, "choose": "majority"},
    "num_problems": 4,
}
SHARED = {**BEST, "rollout": {"tp": 2}}
SCORED = {**DVTS, "scorer": {"kind": "process_reward_model", "model": "process_reward"}}
SCORER = {
    "kind": "process_reward", "steps": 3, "data": {"separator": "\n", "sources": NO_ROWS},
}  # fmt: skip
LABELS: dict[str, Any] = {"kind": "label_steps", "data": {"sources": NO_ROWS}, "samples": 2}
FILTER: dict[str, Any] = {"kind": "filter", "data": {"sources": NO_ROWS}}
ALONE, RESUME, DP2, SHARING = "no axis, .* on one process", "resume: ", "dp2", "rollout.tp: 2"


@dataclasses.dataclass(frozen=True)
class JobBug:
    """A mistake of a ``kind`` in a ``job`` on a ``layout``.

    ``named``: what may differ first, ``suspect``: what is to be looked at; patterns.
    """

    kind: str
    job: dict[str, Any]
    layout: str
    named: str
    suspect: str
    edit: Edit


_WORK = "        trees = [self._tree(i) for i in items]\n        seed, config"
_DONE = '            number, done = number + 1, done + len(part["records"])\n'
_JUDGED = "found = judge_rows([self.rows[i] for i in items], rules, self.held_out)"

# The first of each kind runs every day.
JOB_BUGS = {
    "two_prompts_change_places_in_the_cache": JobBug(
        "cache", BEST, "dp1", "tokens|logprobs", ALONE,
        Edit("rollout/generator.py",
             "zip(prompts, self._compute(prompts))",
             "zip(reversed(prompts), self._compute(prompts))"),
    ),
    "a_fork_writes_a_page_that_others_read": JobBug(
        "cache", MCTS, "dp1", "tokens|logprobs", ALONE,
        Edit("rollout/pages.py",
             "return item.length % self.page_size != 0 and self.holders[item.table[-1]] > 1",
             "return False"),
    ),
    "a_fork_forgets_what_was_drawn_and_not_yet_read": JobBug(
        "cache", BEAM, "dp1", "tokens|logprobs|scores", ALONE,
        Edit("rollout/generator.py",
             "tokens = [*parent.tokens[:end], *request.prompt_tokens]",
             "tokens = [*parent.tokens[: parent.length], *request.prompt_tokens]"),
    ),
    "a_ranks_weights_are_of_another_step": JobBug(
        "ranks", BEST, "dp2", "version", DP2,
        Edit("stages/search.py",
             "self.generator.update_weights(engine.weights())",
             "self.generator.update_weights(\n"
             "            (n, w * (1.0 + 1e-4 * dist.get_rank())) for n, w in engine.weights()\n"
             "        )"),
    ),
    "draws_by_a_problems_place_among_those_of_its_rank_and_part": JobBug(
        "ranks", BEST, "dp2", "tree|tokens", ALONE,
        Edit("stages/search.py",
             _WORK,
             "        trees = [self._tree(i) for i in items]\n"
             "        for number, tree in enumerate(trees):\n"
             "            tree.prompt_id = number\n"
             "        seed, config"),
    ),
    "problems_dealt_in_turn_and_put_together_in_blocks": JobBug(
        "ranks", BEST, "dp2", "tree", DP2,
        Edit("stages/jobs.py",
             "records = [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]",
             "records = [record for part in parts for record in part]"),
    ),
    "a_rank_labels_solutions_of_another": JobBug(
        "ranks", LABELS, "dp2", "scores", DP2,
        Edit("stages/search.py",
             "given = self.given[item]",
             "given = self.given[item - dist.get_rank()]"),
    ),
    "visit_counts_lost_on_resume": JobBug(
        "resume", MCTS, "dp1", "tree", RESUME,
        Edit("stages/jobs.py",
             _DONE,
             '            for node in (n for r in part["records"] for n in r["nodes"]):\n'
             '                node["visits"] = 0\n'
             "            write_result(path, part)\n" + _DONE),
    ),
    "values_backed_up_before_the_resume_are_stale": JobBug(
        "resume", MCTS, "dp2", "tree", RESUME,
        Edit("stages/jobs.py",
             _DONE,
             '            for node in (n for r in part["records"] for n in r["nodes"]):\n'
             '                node["value"] = node["scores"].get("rollouts") or 0.0\n'
             "            write_result(path, part)\n" + _DONE),
    ),
    "a_rank_after_the_first_knows_nothing_held_out": JobBug(
        "rules", FILTER, "dp2", "rows", DP2,
        Edit("stages/filter_job.py",
             _JUDGED,
             "held = self.config.contamination\n"
             "            if not self.ctx.is_main:\n"
             '                held = held.model_copy(update={"sources": []})\n'
             "            found = judge_rows([self.rows[i] for i in items], rules, HeldOut(held))"),
    ),
    "a_part_drops_what_repeats_its_own_rows_before_all_are_judged": JobBug(
        "rules", FILTER, "dp2", "rows", ALONE,
        Edit("stages/filter_job.py",
             _JUDGED,
             f"{_JUDGED}\n"
             "            said = [self.rows[i].texts('row') for i in items]\n"
             "            found = [\n"
             "                dataclasses.replace(v, rule='duplicates', why='said before')\n"
             "                if said[n] in said[:n] else v for n, v in enumerate(found)\n"
             "            ]"),
    ),
    "a_rank_keeps_what_is_too_long": JobBug(
        "rules", FILTER, "dp2", "rows", DP2,
        Edit("stages/filter_job.py",
             "return len(self.ctx.tokenizer.encode(text))",
             "return len(self.ctx.tokenizer.encode(text)) // (1 if self.ctx.is_main else 2)"),
    ),
    "words_of_a_shared_generator_in_another_order": JobBug(
        "sharing", SHARED, "dp2", "tokens|logprobs", SHARING,
        Edit("rollout/sharded.py",
             'return join(logits_BW, self.config.vocab_size, 1, self.mesh.groups["tp"])',
             "return join(logits_BW, self.config.vocab_size, 1,\n"
             '            self.mesh.groups["tp"]).flip(1)'),
    ),
    "what_each_rank_of_a_shared_generator_gives_counts": JobBug(
        "sharing", SHARED, "dp2", "tree", SHARING,
        Edit("stages/jobs.py",
             "parts = self.ranks.collect(self.job.work(mine))[::tp]",
             "parts = self.ranks.collect(self.job.work(mine))"),
    ),
}  # fmt: skip
