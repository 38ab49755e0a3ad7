"""Trees of reasoning steps as plain data, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from shardwise.errors import DataError
from shardwise.rewards import Problem

ROOT = 0
ANSWERED = "stop"  # the reason of a node that ends an answer by itself


class Cost(NamedTuple):
    """Tokens of a search. Its nodes' and, of values by rollouts, theirs.

    ``computed``: go through the model when each distinct prefix does so once. ``drawn``: were
    sampled; a budget counts these. ``shared``: stood in a cache that another sequence had filled.
    ``scored``: went through a scorer's model.
    """

    computed: int = 0
    drawn: int = 0
    shared: int = 0
    scored: int = 0

    def plus(self, other: Cost) -> Cost:
        """The sum of both."""
        return Cost(*(a + b for a, b in zip(self, other)))


NO_COST = Cost()


@dataclasses.dataclass
class Node:
    """One drawn piece of an answer: a step, or the rest of it.

    ``text`` is of ``token_ids`` without stop tokens. ``scores`` by scorer; None: unscorable.
    ``prior`` in [0, 1] among its siblings. ``value`` is what ``visits`` backups left (mean or
    maximum). ``reason``: ``stop`` (the answer is finished), ``step`` (a separator), ``cut`` (the
    step, or the budget, was full), ``length`` (the answer, or the model, was full), ``depth``.
    A ``terminal`` node has no children. ``policy``: checksum of the weights that wrote it.
    """

    id: int
    parent: int | None
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    scores: dict[str, float | None] = dataclasses.field(default_factory=dict)
    prior: float = 1.0
    visits: int = 0
    value: float = 0.0
    terminal: bool = False
    reason: str = ""
    policy: str = ""


@dataclasses.dataclass
class Tree:
    """The nodes of one problem's search, each under the index that is its id; node 0 is the prompt.

    ``prompt_id`` names the problem in its data set: with the seed it decides every draw.
    ``prompt`` are the messages that ask, ``answer`` the node that the search chose.
    """

    problem: Problem
    prompt_id: int
    prompt: list[dict[str, Any]]
    prompt_tokens: list[int]
    method: str = ""
    nodes: list[Node] = dataclasses.field(default_factory=lambda: [Node(ROOT, None)])
    cost: Cost = NO_COST
    answer: int | None = None

    def path(self, node: int) -> list[Node]:
        """The nodes from below the root down to this one."""
        found: list[Node] = []
        while node != ROOT:
            found.append(self.nodes[node])
            parent = self.nodes[node].parent
            assert parent is not None
            node = parent
        return found[::-1]

    def tokens(self, node: int) -> list[int]:
        """Tokens of the answer up to and with a node."""
        return [token for n in self.path(node) for token in n.token_ids]

    def text(self, node: int) -> str:
        """The answer up to and with a node."""
        return "".join(n.text for n in self.path(node))

    def depth(self, node: int) -> int:
        """0 for the root."""
        return len(self.path(node))

    def children(self, node: int) -> list[int]:
        """Its children, in the order in which they were drawn."""
        return [n.id for n in self.nodes if n.parent == node]

    def finished(self, node: int = ROOT) -> list[int]:
        """The finished answers at or below a node, in order."""
        below: set[int] = set()
        for n in self.nodes:  # a parent's id is lower than its child's
            if n.id == node or n.parent in below:
                below.add(n.id)
        return [i for i in sorted(below) if self.nodes[i].reason == ANSWERED]

    def record(self) -> dict[str, Any]:
        """Plain JSON; `from_record` gives an equal tree back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return fields | {
            "problem": self.problem._asdict() | {"others": list(self.problem.others)},
            "nodes": [dataclasses.asdict(n) for n in self.nodes],
            "cost": self.cost._asdict(),
        }


def from_record(record: Mapping[str, Any]) -> Tree:
    """The tree of a record. Raises DataError for a record that is none."""
    try:
        problem = dict(record["problem"])
        tree = Tree(
            **{
                **record,
                "problem": Problem(**problem | {"others": tuple(problem["others"])}),
                "nodes": [Node(**n) for n in record["nodes"]],
                "cost": Cost(**record["cost"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"no record of a search tree: {error}") from error
    for i, node in enumerate(tree.nodes):
        parent = -1 if node.parent is None else node.parent
        if node.id != i or not (parent < i if i else parent == -1) or (i and parent < 0):
            raise DataError(f"no record of a search tree: node {i} has the parent {node.parent}")
    return tree


def back_up(tree: Tree, node: int, value: float, how: str) -> None:
    """Count a visit of a node and of all above it, and take ``value`` into theirs.

    ``mean``: the mean of all values (Kocsis and Szepesvari 2006); ``max``: the best one.
    """
    for n in [tree.nodes[ROOT], *tree.path(node)]:
        n.visits += 1
        if how == "max" and n.visits > 1:
            n.value = max(n.value, value)
        else:
            n.value += (value - n.value) / (n.visits if how == "mean" else 1)


def distinct(tree: Tree, nodes: Sequence[int]) -> list[int]:
    """Without those that say what an earlier one of the same parent says."""
    seen: dict[tuple[int | None, tuple[int, ...]], int] = {}
    for i in nodes:
        seen.setdefault((tree.nodes[i].parent, tuple(tree.nodes[i].token_ids)), i)
    return list(seen.values())


def set_priors(tree: Tree, children: Sequence[int]) -> list[int]:
    """Priors of the distinct ones of new siblings, which it returns; the others get 0.

    In proportion to the geometric mean of a child's token probabilities, as a step's length says
    nothing of its worth (Feng et al. 2023, "AlphaZero-like tree-search", section 3.2).
    """
    kept = distinct(tree, children)
    means = [math.fsum(tree.nodes[i].logprobs) / len(tree.nodes[i].logprobs) for i in kept]
    weights = [math.exp(m) for m in means]
    for i in children:
        tree.nodes[i].prior = 0.0
    for i, weight in zip(kept, weights, strict=True):
        tree.nodes[i].prior = weight / total if (total := math.fsum(weights)) else 1 / len(kept)
    return kept


def walk(tree: Tree) -> Iterator[tuple[int, Node]]:
    """(depth, node) of every node, parents first."""
    depths = {ROOT: 0}
    for n in tree.nodes:
        if n.parent is not None:
            depths[n.id] = depths[n.parent] + 1
        yield depths[n.id], n
