"""Trees as data to learn from: rows in the formats of `shardwise.data.formats`.

All of it reads scores that stand in the tree; ``truth`` names those that say what is right.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from shardwise.data.steps import Solution
from shardwise.search.tree import ANSWERED, Node, Tree, distinct

Row = dict[str, Any]
Estimate = Callable[[Tree, int], float | None]


def answers(tree: Tree, truth: str) -> list[tuple[int, float]]:
    """(node, score) of the finished answers that have one, each text once, the best first."""
    seen: dict[str, tuple[int, float]] = {}
    for i in tree.finished():
        score = tree.nodes[i].scores.get(truth)
        if score is not None:
            seen.setdefault(tree.text(i), (i, score))
    return sorted(seen.values(), key=lambda pair: -pair[1])


def answer_rows(tree: Tree, truth: str) -> list[Row]:
    """All of `answers` with what is needed to judge them again (``prompt-completion``)."""
    _, _, answer, meta, _, others = tree.problem
    known = [answer, *others] if others else answer
    return [
        {**meta, "prompt": tree.prompt, "completion": tree.text(i), "answer": known, truth: score}
        for i, score in answers(tree, truth)
    ]


def sft_rows(tree: Tree, truth: str, *, above: float = 0.5, most: int | None = None) -> list[Row]:
    """Answers with a score above ``above``, the best ``most`` of them (``prompt-completion``)."""
    good = [i for i, score in answers(tree, truth) if score > above]
    return [{"prompt": tree.prompt, "completion": tree.text(i)} for i in good[:most]]


def pairs(tree: Tree, truth: str, *, margin: float = 0.0, estimate: Estimate) -> Iterator[Row]:
    """Of each fork, its best branch's best answer against its worst's worst (``preference``).

    Both answers are the same up to the fork. ``margin``: by how much the branches' estimates must
    differ, at least, and their answers' scores more than 0; a row's ``margin`` is the difference of
    the scores.
    """
    scored = dict(answers(tree, truth))
    for node in tree.nodes:
        ends = {c: [i for i in tree.finished(c) if i in scored] for c in _branches(tree, node.id)}
        known = [(estimate(tree, c), c) for c in ends if ends[c]]
        values = {c: v for v, c in known if v is not None}
        if len(values) < 2:
            continue
        best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
        chosen = max(ends[best], key=scored.__getitem__)
        rejected = min(ends[worst], key=scored.__getitem__)
        gap = scored[chosen] - scored[rejected]
        if values[best] - values[worst] >= margin and gap > 0.0:
            yield {
                "prompt": tree.prompt,
                "chosen": tree.text(chosen),
                "rejected": tree.text(rejected),
                "margin": gap,
            }


def _branches(tree: Tree, node: int) -> list[int]:
    return distinct(tree, tree.children(node))


def by_answers(truth: str) -> Estimate:
    """A step's worth as the mean score of the finished answers behind it."""

    def estimate(tree: Tree, node: int) -> float | None:
        scores = [tree.nodes[i].scores.get(truth) for i in tree.finished(node)]
        known = [s for s in scores if s is not None]
        return statistics.fmean(known) if known else None

    return estimate


def by_value(tree: Tree, node: int) -> float | None:
    """A step's worth as what the search backed up to it."""
    return tree.nodes[node].value if tree.nodes[node].visits else None


def by_score(scorer: str) -> Estimate:
    """A step's worth as a scorer gave it: ``rollouts`` for a Monte Carlo estimate."""
    return lambda tree, node: tree.nodes[node].scores.get(scorer)


def step_rows(
    tree: Tree,
    separator: str,
    estimate: Estimate,
    *,
    labels: Literal["soft", "hard"] = "soft",
    most: int | None = None,
) -> list[Row]:
    """The first ``most`` distinct answers with a label for each step (``steps``).

    A label is the estimate of the node that completes the step, kept within 0 and 1; hard: whether
    it is above 0 (Wang et al. 2023, Math-Shepherd, section 3.3). Answers with a step of unknown
    worth are left out.
    """
    found: dict[str, Row] = {}
    for i in tree.finished():
        text = tree.text(i)
        ends = step_nodes(tree, i, separator)
        values = [estimate(tree, node) for _, node in ends]
        if text in found or not values or None in values:
            continue
        soft = [min(max(v, 0.0), 1.0) for v in values if v is not None]
        said = soft if labels == "soft" else [float(v > 0.0) for v in soft]
        steps = [step for step, _ in ends]
        found[text] = {"prompt": tree.prompt, "steps": steps, "labels": said}
    return list(found.values())[:most]


def step_nodes(tree: Tree, node: int, separator: str) -> list[tuple[str, int]]:
    """The steps of an answer, each with the node in which it, and the separator, is complete.

    As `data.steps.step_ends` finds them: nothing but space is no step, and the answer's end ends
    the last one.
    """
    pieces = tree.text(node).split(separator)
    path = tree.path(node)
    found: list[tuple[str, int]] = []
    reached = written = place = 0
    for number, piece in enumerate(pieces):
        reached += len(piece) + len(separator) * (number < len(pieces) - 1)
        while written < reached and place < len(path):
            written += len(path[place].text)
            place += 1
        if piece.strip():
            found.append((piece, path[max(place - 1, 0)].id))
    if found:  # what follows the last step is its end
        found[-1] = (found[-1][0], node)
    return found


def solution_nodes(encoded: Solution, text: Callable[[list[int]], str]) -> list[Node]:
    """A given solution as one branch below a root; ``text``: of tokens, without stop tokens.

    Each node ends with the token at which a process reward model reads its step.
    """
    begins = [0, *(end + 1 for end in encoded.ends)]
    nodes = []
    for i, (begin, end) in enumerate(zip(begins, encoded.ends)):
        ids = encoded.answer[begin : end + 1]
        nodes.append(Node(i + 1, i, ids, text=text(ids), reason="step"))
    nodes[-1].reason, nodes[-1].terminal = ANSWERED, True
    return nodes


def solve_rate(tree: Tree, truth: str, above: float = 0.5) -> float | None:
    """The share of answers with a score above ``above``; None of none.

    One that was given up is wrong; one that cannot be scored is left out.
    """
    scores = [
        n.scores.get(truth) if n.reason == ANSWERED else 0.0 for n in tree.nodes if n.terminal
    ]
    known = [s for s in scores if s is not None]
    return sum(s > above for s in known) / len(known) if known else None


def problem_row(
    tree: Tree, truth: str, *, above: float = 0.5, lowest: float = 0.0, highest: float = 1.0
) -> Row | None:
    """The problem, if its solve rate is in the band (``problems``), with that in ``solve_rate``."""
    rate = solve_rate(tree, truth, above)
    if rate is None or not lowest <= rate <= highest:
        return None
    _, question, answer, meta, messages, others = tree.problem
    own: Mapping[str, Any] = {
        "prompt": list(messages) if messages else question,
        "answer": [answer, *others] if others else answer,
        "solve_rate": rate,
    }
    return {**{k: v for k, v in meta.items() if k not in own}, **own}
