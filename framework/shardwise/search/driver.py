"""One driver runs the searches of many problems on one engine, and scores them together.

**Budget.** ``budget_tokens`` bounds what is drawn for a problem, and is never exceeded: before
sequences start, what is left is divided among them evenly, and where it is less than a token for
each, only the first ones start. So a search needs to know nothing of other sequences in flight.

**Sharing.** A node's sequence is held while the node may be expanded; its children are forks of it.
Afterwards the children hold what they need of it, and it is released.

**Draws** are functions of (seed, name, problem, node, sample, token).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shardwise.errors import ConfigError
from shardwise.ops import rng
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.sequences import Completion, Request
from shardwise.search.choose import choose
from shardwise.search.config import MethodConfig, StepsConfig
from shardwise.search.methods import Drop, Expand, Method, Score, Wish, start
from shardwise.search.scorers import Path, Scorer, mean_score
from shardwise.search.tree import ANSWERED, NO_COST, Cost, Node, Tree


@dataclasses.dataclass(frozen=True)
class Policy:
    """How answers are written: ``sampling`` of a whole answer, with the tokenizer's stop tokens.

    ``max_seq_len``: tokens that the model takes, prompt and answer.
    """

    sampling: Sampling
    steps: StepsConfig
    max_seq_len: int
    decode: Callable[[list[int]], str]

    def room(self, tree: Tree, node: int) -> int:
        """How many tokens the answer may still have behind a node."""
        written = len(tree.tokens(node))
        limit = self.max_seq_len - len(tree.prompt_tokens)
        return min(self.sampling.max_new_tokens, limit) - written

    def text(self, token_ids: Sequence[int]) -> str:
        """Without stop tokens."""
        stops = set(self.sampling.stop_ids)
        return self.decode([t for t in token_ids if t not in stops])


@dataclasses.dataclass
class _Search:
    """One problem's search: its coroutine, its wish, and what the wish still waits for."""

    tree: Tree
    method: Method
    budget: int | None
    key: int
    wish: Wish | None = None
    unscored: tuple[int, ...] = ()  # nodes of a wish for scores that have none
    # Of the sequences of the wish, in order: node, number; its completion when it has ended.
    asked: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    found: dict[int, Completion] = dataclasses.field(default_factory=dict)
    held: dict[int, int] = dataclasses.field(default_factory=dict)  # sequences by node
    cost: Cost = NO_COST

    def share(self, wanted: int) -> tuple[int, int | None]:
        """How many of ``wanted`` sequences may start, and how many tokens each may draw."""
        if self.budget is None:
            return wanted, None
        left = self.budget - self.cost.drawn
        number = min(wanted, left)
        return number, left // number if number else 0


class Driver:
    """Grows trees on one engine, each by the coroutine that ``grow`` makes of it.

    ``budget``: tokens that may be drawn for a tree. ``concurrent``: trees at a time.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        policy: Policy,
        grow: Callable[[Tree], Method],
        scorer: Scorer | None,
        *,
        budget: int | None = None,
        seed: int = 0,
        name: str = "search",
        concurrent: int = 32,
    ) -> None:
        self.engine, self.policy, self.grow, self.budget = engine, policy, grow, budget
        self.scorer, self.seed, self.name, self.concurrent = scorer, seed, name, concurrent
        self._owner: dict[int, _Search] = {}  # of every sequence in flight

    def run(self, trees: Iterable[Tree]) -> list[Tree]:
        """Grow each tree; all of them, in their order.

        A tree that was searched before goes on from what it holds, with its cost.
        """
        every = list(trees)
        waiting, active = deque(every), 0
        ready: list[tuple[_Search, Any]] = []
        while True:
            while waiting and active < self.concurrent:
                ready.append((self._begin(waiting.popleft()), None))
                active += 1
            due: list[_Search] = []
            for search, answer in ready:
                if not self._advance(search, answer):
                    active -= 1
                elif not search.asked:
                    due.append(search)
            ready = self._score(due)
            if not ready and not (waiting and active < self.concurrent):
                if not active:
                    return every
                ready = self._step()

    def _begin(self, tree: Tree) -> _Search:
        key = rng.key(self.seed, self.name, "search", tree.prompt_id)
        return _Search(tree, self.grow(tree), self.budget, key, cost=tree.cost)

    def _advance(self, search: _Search, answer: Any) -> bool:
        """Send an answer, and grant wishes until one must be waited for; False at the end."""
        while True:
            try:
                search.wish = search.method.send(answer)
            except StopIteration:
                self._end(search)
                return False
            answer = None
            if isinstance(search.wish, Drop):
                self._release(search, search.wish.nodes)
            elif isinstance(search.wish, Score):
                self._rollouts(search, search.wish)
                if search.unscored:
                    return True
            else:
                self._expand(search, search.wish)
                if search.asked:
                    return True
                answer = [[] for _ in search.wish.nodes]

    def _end(self, search: _Search) -> None:
        self._release(search, list(search.held))
        search.tree.cost = search.cost

    def _release(self, search: _Search, nodes: Sequence[int]) -> None:
        for node in nodes:
            if (number := search.held.pop(node, None)) is not None:
                self.engine.release(number)

    def _expand(self, search: _Search, wish: Expand) -> None:
        """Start the sequences of a wish, as far as the budget goes."""
        children = {n: len(search.tree.children(n)) for n in wish.nodes}
        wanted = [n for n in wish.nodes for _ in range(wish.samples)]
        number, cap = search.share(len(wanted))
        for node in dict.fromkeys(wanted[:number]):
            samples = wanted[:number].count(node)
            room = self.policy.room(search.tree, node)
            limit = room if wish.whole else min(room, self.policy.steps.max_step_tokens)
            limit = limit if cap is None else min(limit, cap)
            stops = () if wish.whole else (self.policy.steps.separator,)
            hold = not wish.whole or limit < room
            self._open(search, node, search.key, children[node], samples, limit, stops, hold)
        self._release(search, wish.nodes)

    def _rollouts(self, search: _Search, wish: Score) -> None:
        """Start the answers that a scorer by rollouts wants of nodes that are none."""
        if self.scorer is None:
            raise ConfigError(f"{search.tree.method} wants scores, and there is no scorer")
        samples, tree, name = self.scorer.samples, search.tree, self.scorer.name
        search.unscored = tuple(n for n in wish.nodes if name not in tree.nodes[n].scores)
        open_ = [n for n in search.unscored if samples and not self._has_end(tree, n)]
        wanted = [n for n in open_ for _ in range(samples)]
        number, cap = search.share(len(wanted))
        key = rng.key(self.seed, self.name, "rollouts", tree.prompt_id)
        for node in dict.fromkeys(wanted[:number]):
            room = self.policy.room(tree, node)
            limit = room if cap is None else min(room, cap)
            self._open(search, node, key, 0, wanted[:number].count(node), limit, (), False)

    def _has_end(self, tree: Tree, node: int) -> bool:
        """Whether nothing can be written behind a node."""
        return tree.nodes[node].reason == ANSWERED or self.policy.room(tree, node) < 1

    def _open(
        self,
        search: _Search,
        node: int,
        key: int,
        first: int,
        samples: int,
        limit: int,
        stops: tuple[str, ...],
        hold: bool,
    ) -> None:
        """Sequences that go on from a node; by a fork where its own is held."""
        tree, sampling = search.tree, self.policy.sampling
        update = {"max_new_tokens": limit, "stop_strings": (*sampling.stop_strings, *stops)}
        sampling = sampling.model_copy(update=update)
        prefix = [*tree.prompt_tokens, *tree.tokens(node)]
        if node in search.held:
            request = Request(node, (), samples, first)
            numbers = self.engine.fork(search.held[node], request, sampling, key, hold=hold)
            computed = 1  # a sequence's last token was drawn, and never read
        else:
            request = Request(node, prefix, samples, first)
            numbers = self.engine.submit(request, sampling, key, hold=hold)
            computed = len(prefix)
        shared = samples * len(prefix) - computed
        search.cost = search.cost.plus(Cost(computed=computed, shared=shared))
        search.asked += [(node, number) for number in numbers]
        self._owner |= dict.fromkeys(numbers, search)

    def _step(self) -> list[tuple[_Search, Any]]:
        """One token of every sequence; the searches whose wish is now fulfilled."""
        progress = self.engine.step()
        if not progress:
            raise RuntimeError("sequences are waited for, and the engine has none in flight")
        complete = []
        for completion, number in ((p.completion, p.sequence) for p in progress):
            if completion is None or number not in self._owner:
                continue
            search = self._owner.pop(number)
            search.found[number] = completion
            drawn = len(completion.token_ids)
            search.cost = search.cost.plus(Cost(computed=max(drawn - 1, 0), drawn=drawn))
            if len(search.found) == len(search.asked):
                complete.append(search)
        ready = [(s, self._grown(s)) for s in complete if isinstance(s.wish, Expand)]
        return ready + self._score([s for s in complete if isinstance(s.wish, Score)])

    def _grown(self, search: _Search) -> list[list[int]]:
        """Nodes of the sequences that ended, in the order in which they were asked for."""
        assert isinstance(search.wish, Expand)
        children: dict[int, list[int]] = {n: [] for n in search.wish.nodes}
        for parent, number in search.asked:
            node = self._node(search.tree, parent, search.found[number], search.wish.whole)
            search.tree.nodes.append(node)
            children[parent].append(node.id)
            search.held[node.id] = number
            if node.terminal:
                self._release(search, [node.id])
        search.asked, search.found = [], {}
        return list(children.values())

    def _node(self, tree: Tree, parent: int, completion: Completion, whole: bool) -> Node:
        ids, steps = completion.token_ids, self.policy.steps
        stopped = completion.finish_reason == "stop"
        at_end = bool(ids) and ids[-1] in self.policy.sampling.stop_ids
        if stopped and (whole or at_end or steps.separator not in self.policy.decode(ids)):
            reason = ANSWERED
        elif self.policy.room(tree, parent) <= len(ids):
            reason = "length"
        elif not whole and tree.depth(parent) + 1 >= steps.max_depth:
            reason = "depth"
        else:
            reason = "step" if stopped else "cut"
        return Node(
            id=len(tree.nodes),
            parent=parent,
            token_ids=list(ids),
            logprobs=list(completion.logprobs),
            text=self.policy.text(ids),
            terminal=reason not in ("step", "cut"),
            reason=reason,
            policy=self.engine.checksum,
        )

    def _score(self, searches: Sequence[_Search]) -> list[tuple[_Search, Any]]:
        """Score what all of them want in one call; each with its answer, which is nothing."""
        if not searches:
            return []
        assert self.scorer is not None
        parts = [(s, n, self._paths(s, n)) for s in searches for n in s.unscored]
        scores = iter(self.scorer([path for *_, paths in parts for path in paths]))
        for search, node, paths in parts:
            score = mean_score([next(scores) for _ in paths])
            search.tree.nodes[node].scores[self.scorer.name] = score
            if self.scorer.reads:
                read = sum(len(p.prompt_tokens) + len(p.token_ids) for p in paths)
                search.cost = search.cost.plus(Cost(scored=read))
        for search in searches:
            search.asked, search.found = [], {}
        return [(search, None) for search in searches]

    def _paths(self, search: _Search, node: int) -> list[Path]:
        """What is scored for a node: itself, or the answers drawn from it.

        An answer that the budget cut says nothing of the node, and is left out.
        """
        assert self.scorer is not None
        tree, problem = search.tree, search.tree.problem
        before, text = tree.tokens(node), tree.text(node)

        def path(ids: list[int], added: str, finished: bool) -> Path:
            said = text + added
            return Path(problem, tree.prompt_id, tree.prompt_tokens, ids, said, finished)

        if not self.scorer.samples or self._has_end(tree, node):
            return [path(before, "", tree.nodes[node].reason == ANSWERED)]
        found = [search.found[number] for parent, number in search.asked if parent == node]
        room = self.policy.room(tree, node)
        return [
            path([*before, *c.token_ids], self.policy.text(c.token_ids), c.finish_reason == "stop")
            for c in found
            if c.finish_reason == "stop" or len(c.token_ids) >= room
        ]


def search(
    engine: RolloutEngine,
    policy: Policy,
    config: MethodConfig,
    scorer: Scorer | None,
    trees: Iterable[Tree],
    *,
    seed: int = 0,
    name: str = "search",
    concurrent: int = 32,
) -> list[Tree]:
    """Search by the method of a config, and choose an answer in each tree."""
    by = None if scorer is None else scorer.name
    driver = Driver(
        engine,
        policy,
        lambda tree: start(tree, config, by),
        scorer,
        budget=config.budget_tokens,
        seed=seed,
        name=name,
        concurrent=concurrent,
    )
    grown = driver.run(trees)
    for tree in grown:
        tree.answer = choose(tree, config.choose, config.extract, by)
    return grown


def total_cost(trees: Iterable[Tree]) -> Cost:
    """Of several searches."""
    cost = NO_COST
    for tree in trees:
        cost = cost.plus(tree.cost)
    return cost
