"""Which of a tree's finished answers is given."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.rewards.numerals import read_number
from shardwise.rewards.verifiers import Extract, extract_answer
from shardwise.search.config import Choose
from shardwise.search.tree import Tree


def said(text: str, extract: Extract) -> str | None:
    """What an answer says, as a text that is equal for equal answers; None where it says nothing.

    Numbers are equal by value, texts without case and spacing.
    """
    answer = extract_answer(text, extract)
    if not answer:
        return None
    number = read_number(answer)
    if number is not None and number.value is not None:
        return str(number.value)
    return " ".join(answer.split()).casefold()


def vote(answers: Sequence[str | None], weights: Sequence[float]) -> int | None:
    """The first place of the answer with the largest sum of weights; None without any answer."""
    sums: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            sums[answer] = sums.get(answer, 0.0) + weight
    return answers.index(max(sums, key=lambda a: sums[a])) if sums else None


def choose(tree: Tree, how: Choose, extract: Extract, scorer: str | None) -> int | None:
    """The node of the answer; ties go to the first. None where no answer was finished.

    ``best``: of the best score. ``majority``: what most say (Wang et al. 2022,
    "Self-consistency"). ``weighted``: what has the largest sum of scores (Li et al. 2022,
    "Making language models better reasoners with step-aware verifier"). Answers without a score
    are left out, but for a majority.
    """
    finished = tree.finished()
    scores = [tree.nodes[i].scores.get(scorer or "") for i in finished]
    if how == "best":
        known = [(i, s) for i, s in zip(finished, scores) if s is not None]
        return max(known, key=lambda pair: pair[1])[0] if known else None
    weights = [1.0 if how == "majority" else s or 0.0 for s in scores]
    found = vote([said(tree.text(i), extract) for i in finished], weights)
    return None if found is None else finished[found]
