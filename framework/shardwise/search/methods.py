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
from shardwise.search.tree import ANSWERED, ROOT, Node, Tree, back_up, distinct, set_priors


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
    method = _grow(tree, config, scorer)
    if scorer is None or config.stop_at is None:
        yield from method
    else:
        yield from _until(config.stop_at, method, tree, scorer)
    if scorer is not None:
        yield Score(tuple(tree.finished()))


def _grow(tree: Tree, config: MethodConfig, scorer: str | None) -> Method:
    if isinstance(config, BestOfNConfig):
        return _best_of_n(tree, config)
    if scorer is None:
        raise ConfigError(f"{tree.method} needs a scorer")
    if isinstance(config, BeamConfig):
        return _beam(tree, config, scorer)
    if isinstance(config, DvtsConfig):
        return _dvts(tree, config, scorer)
    assert isinstance(config, MctsConfig)
    return _mcts(tree, config, scorer)


def _until(score: float, method: Method, tree: Tree, scorer: str) -> Method:
    """A method up to the first finished answer with such a score."""
    answer = None
    while True:
        try:
            wish = method.send(answer)
        except StopIteration:
            return
        answer = yield wish
        if isinstance(wish, Score):
            ends = [n for n in map(tree.nodes.__getitem__, wish.nodes) if n.reason == ANSWERED]
            if any(n.scores.get(scorer) is not None and worth(n, scorer) >= score for n in ends):
                return


def label(tree: Tree) -> Method:
    """Score every node of a tree that is given: with rollouts, what its steps are worth."""
    tree.method = "label"
    yield Score(tuple(n.id for n in tree.nodes[1:]))


def worth(node: Node, scorer: str) -> float:
    """A node's score; what cannot be scored is worth nothing to a search."""
    score = node.scores.get(scorer)
    return 0.0 if score is None else score


def _best_of_n(tree: Tree, config: BestOfNConfig) -> Method:
    """N answers, the same ones together or, where one may be enough, one after the other.

    What the budget cut goes on while there is any left.
    """
    one_by_one = config.stop_at is not None
    for _ in range(config.samples if one_by_one else 1):
        [drawn] = yield Expand((ROOT,), 1 if one_by_one else config.samples, whole=True)
        while unfinished := [i for i in drawn if not tree.nodes[i].terminal]:
            found = yield Expand(tuple(unfinished), 1, whole=True)
            drawn = [i for children in found for i in children]
        if one_by_one:
            yield Score(tuple(drawn))


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

    What is visited often is widened (Coulom 2007, "Computing Elo ratings of move patterns in the
    game of Go", section 4): else a tree whose answers are all finished would draw nothing more.
    """
    while tree.nodes[ROOT].visits < config.simulations:
        node = ROOT
        while True:
            children = [i for i in tree.children(node) if tree.nodes[i].prior > 0.0]
            if (more := _missing(tree, node, config)) and (config.widen or not children):
                [drawn] = yield Expand((node,), more)
                if not drawn:  # the budget is spent
                    return
                children = set_priors(tree, tree.children(node))
                yield Drop(tuple(i for i in drawn if i not in children))
            if not children:
                break
            node = max(children, key=selection(tree, tree.nodes[node], config))
        yield Score((node,))
        back_up(tree, node, worth(tree.nodes[node], scorer), config.backup)


def _missing(tree: Tree, node: int, config: MctsConfig) -> int:
    """How many steps are still to be drawn from a node; 0 for a leaf that was not yet valued."""
    n = tree.nodes[node]
    if n.terminal or not (node == ROOT or n.visits):
        return 0
    wanted = math.ceil(config.expand * math.pow(max(n.visits, 1), config.widen))
    return max(wanted - len(tree.children(node)), 0)


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
