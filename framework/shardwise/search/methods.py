"""Methods of search as pure coroutines: they yield wishes and are sent what became of them.

A method reads its tree and writes ``prior``, ``visits`` and ``value``; nodes are added by whoever
grants the wishes (`driver`), in the order in which they were wished for. So a method knows nothing
of engines, and what it finds does not depend on what else is searched at the same time. Ties go to
the node that was drawn first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from shardwise.errors import ConfigError
from shardwise.search.config import BeamConfig, BestOfNConfig, DvtsConfig, MctsConfig, MethodConfig
from shardwise.search.tree import ROOT, Node, Tree, back_up, distinct, set_priors


@dataclasses.dataclass(frozen=True)
class Expand:
    """``samples`` children of each node wanted; answered by their ids, node by node.

    ``whole``: to the end of the answer, not of a step. Where the budget is short, there are fewer.
    """

    nodes: tuple[int, ...]
    samples: int
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Score:
    """Scores wanted in ``scores`` of the nodes, of those that have none; answered by nothing."""

    nodes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Drop:
    """These nodes will never be expanded; answered by nothing."""

    nodes: tuple[int, ...]


Wish = Expand | Score | Drop
Method = Generator[Wish, Any, None]


def start(tree: Tree, config: MethodConfig, scorer: str | None) -> Method:
    """The coroutine of a config; ``scorer``: the name under which its scores stand.

    At its end, all finished answers are scored.
    """
    tree.method = config.kind  # type: ignore[attr-defined]
    if isinstance(config, BestOfNConfig):
        yield from _best_of_n(tree, config)
    elif scorer is None:
        raise ConfigError(f"{tree.method} needs a scorer")
    elif isinstance(config, BeamConfig):
        yield from _beam(tree, config, scorer)
    elif isinstance(config, DvtsConfig):
        yield from _dvts(tree, config, scorer)
    elif isinstance(config, MctsConfig):
        yield from _mcts(tree, config, scorer)
    if scorer is not None:
        yield Score(tuple(tree.finished()))


def label(tree: Tree) -> Method:
    """Score every node of a tree that is given: with rollouts, what its steps are worth."""
    tree.method = "label"
    yield Score(tuple(n.id for n in tree.nodes[1:]))


def worth(node: Node, scorer: str) -> float:
    """A node's score; what cannot be scored is worth nothing to a search."""
    score = node.scores.get(scorer)
    return 0.0 if score is None else score


def _best_of_n(tree: Tree, config: BestOfNConfig) -> Method:
    """N answers; what the budget cut goes on while there is any left."""
    [drawn] = yield Expand((ROOT,), config.samples, whole=True)
    while unfinished := [i for i in drawn if not tree.nodes[i].terminal]:
        found = yield Expand(tuple(unfinished), 1, whole=True)
        drawn = [i for children in found for i in children]


def _top(tree: Tree, nodes: Sequence[int], number: int, scorer: str) -> list[int]:
    """The best ones, in their order."""
    ranked = sorted(nodes, key=lambda i: -worth(tree.nodes[i], scorer))  # a stable sort
    return sorted(ranked[:number])


def _beam(tree: Tree, config: BeamConfig, scorer: str) -> Method:
    """Snell et al. 2024, "Scaling LLM Test-Time Compute", section 5.2: N first steps, of which the
    best N / M go on with M steps each, and so on. Answers that end take their beam with them.
    """
    keep = config.samples // config.width
    active, samples = [ROOT], config.samples
    while active:
        found = yield Expand(tuple(active), samples)
        drawn = [i for children in found for i in distinct(tree, children)]
        yield Score(tuple(drawn))
        best = _top(tree, drawn, keep, scorer)
        active = [i for i in best if not tree.nodes[i].terminal]
        keep -= len(best) - len(active)
        yield Drop(tuple(i for children in found for i in children if i not in active))
        samples = config.width


def _dvts(tree: Tree, config: DvtsConfig, scorer: str) -> Method:
    """Beeching et al. 2024, "Scaling test-time compute with open models": N / M subtrees that know
    nothing of each other; of M steps of each the best goes on.
    """
    trees, width = config.samples // config.width, config.width
    [first] = yield Expand((ROOT,), config.samples)
    # The subtrees' first steps, in the order of their draws: in turns, so that a budget that is
    # too short for all of them takes from each.
    groups = [first[k::trees] for k in range(trees)]
    while any(groups):
        drawn = [i for group in groups for i in distinct(tree, group)]
        yield Score(tuple(drawn))
        best = [i for group in groups for i in _top(tree, distinct(tree, group), 1, scorer)]
        active = [i for i in best if not tree.nodes[i].terminal]
        yield Drop(tuple(i for group in groups for i in group if i not in active))
        groups = (yield Expand(tuple(active), width)) if active else []


def _mcts(tree: Tree, config: MctsConfig, scorer: str) -> Method:
    """Walks from the root by `selection`; a leaf is valued when it is first reached, and expanded
    when it is reached again. A tree from a record goes on where it was.
    """
    while tree.nodes[ROOT].visits < config.simulations:
        node = ROOT
        while True:
            children = [i for i in tree.children(node) if tree.nodes[i].prior > 0.0]
            if (
                not children
                and not tree.nodes[node].terminal
                and (node == ROOT or tree.nodes[node].visits)
            ):
                [drawn] = yield Expand((node,), config.expand)
                if not drawn:  # the budget is spent
                    return
                children = set_priors(tree, drawn)
                yield Drop(tuple(i for i in drawn if i not in children))
            if not children:
                break
            node = max(children, key=selection(tree, tree.nodes[node], config))
        yield Score((node,))
        back_up(tree, node, worth(tree.nodes[node], scorer), config.backup)


def selection(tree: Tree, parent: Node, config: MctsConfig) -> Callable[[int], float]:
    """What a walk maximises over the children of a node with n visits, of which a child has m.

    ``uct``: value + c sqrt(ln n / m), an unvisited child first (Kocsis and Szepesvari 2006,
    "Bandit based Monte-Carlo planning"). ``puct``: value + c prior sqrt(n) / (1 + m), where an
    unvisited child has its parent's value (Silver et al. 2017, "Mastering the game of Go without
    human knowledge", Methods, with the exploration constant as it stands).
    """
    c, n = config.exploration, max(parent.visits, 1)

    def uct(i: int) -> float:
        child = tree.nodes[i]
        if not child.visits:
            return math.inf
        return child.value + c * math.sqrt(math.log(n) / child.visits)

    def puct(i: int) -> float:
        child = tree.nodes[i]
        value = child.value if child.visits else parent.value
        return value + c * child.prior * math.sqrt(n) / (1 + child.visits)

    return uct if config.select == "uct" else puct
