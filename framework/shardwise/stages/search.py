"""The jobs that search for answers, and that label steps by rollouts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from shardwise.checkpoint.convert import open_model
from shardwise.config.start import located
from shardwise.data.chat import encode_chat
from shardwise.data.conversation import take_variables
from shardwise.data.preferences import asked
from shardwise.data.steps import Solution, encode_solution
from shardwise.errors import ConfigError, DataError, UserError
from shardwise.losses.scores import ANSWER_CHANCE, score_of
from shardwise.models.common.config import DecoderConfig
from shardwise.precision.policy import precision_of
from shardwise.rewards import Problem, ProblemSet, build_reward, prompt_messages
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.native import NativeBackend
from shardwise.rollout.plain import PlainRollout
from shardwise.search import extract, methods
from shardwise.search.config import (
    ProcessRewardModelConfig,
    RewardModelConfig,
    RolloutsConfig,
    RulesConfig,
    SelfConsistencyConfig,
    VerifierConfig,
)
from shardwise.search.driver import Driver, Policy, search, total_cost
from shardwise.search.scorers import ByRules, Scorer, SelfConsistency, Verifier
from shardwise.search.scorers import Path as Answer
from shardwise.search.scoring_models import ModelScorer
from shardwise.search.tree import Tree, from_record
from shardwise.stages.base import StageContext
from shardwise.stages.initial_weights import folder_hash
from shardwise.stages.jobs import Job, Outcome
from shardwise.stages.search_config import LabelStepsConfig, SearchConfig, SearchJobConfig
from shardwise.stages.served import Served, serve

TRUTH = "verifier"  # the name of the scores that say which answers are right


class _SearchJob(Job):
    """What both jobs have: a generator, a verifier, and trees."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, tokenizer = ctx, ctx.tokenizer
        config: SearchJobConfig = ctx.stage
        self.chunk = config.chunk
        sampling = config.sampling.stopping_at(tokenizer.stop_ids)
        self.policy = Policy(sampling, config.step, ctx.run.model.max_seq_len, tokenizer.decode)
        engine = ctx.engine(None)
        ctx.load_initial_weights(engine)
        self.dtype = precision_of(ctx.precision, ctx.device).compute
        self.served = _served(ctx, self.dtype)
        self.generator, self.tp = self.served.generator, self.served.tp
        self.generator.update_weights(engine.weights())
        exact = isinstance(getattr(self.generator, "backend", None), NativeBackend)
        self.concurrent = config.concurrent or (config.chunk if exact else 1)
        self.reward = build_reward(config.reward)

    def figures(self, records: Sequence[Any]) -> dict[str, float]:
        """See `Job`."""
        return self.measured([from_record(r) for r in records])

    def measured(self, trees: Sequence[Tree]) -> dict[str, float]:
        """What some trees cost."""
        cost = total_cost(trees)
        read = cost.computed + cost.shared
        shared = {"shared_fraction": cost.shared / read} if read else {}
        return {"tokens_drawn": cost.drawn / max(len(trees), 1), **shared}

    def judge(self, trees: Sequence[Tree]) -> None:
        """The verifier's word on every finished answer that has it not yet."""
        ends = [(t, i) for t in trees for i in t.finished() if TRUTH not in t.nodes[i].scores]
        answers = [
            Answer(t.problem, t.prompt_id, t.prompt_tokens, t.tokens(i), t.text(i), True)
            for t, i in ends
        ]
        verify = self.served.agreed(Verifier(self.reward))
        for (tree, i), score in zip(ends, verify(answers), strict=True):
            tree.nodes[i].scores[TRUTH] = score


def _served(ctx: StageContext, dtype: torch.dtype) -> Served[RolloutEngine]:
    """What draws; on the plain engine, which is an oracle, from no cache; a collective call."""
    if ctx.stage.engine.kind != "plain" or ctx.inherited is not None:
        return serve(ctx, dtype, adapter=ctx.inherited)
    engine = PlainRollout(ctx.run.model, dtype, ctx.tokenizer.decode, ctx.device)
    return Served(engine, dist.get_rank(), dist.get_world_size(), 0)


def _hash(*said: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(said).encode())


class SearchJob(_SearchJob):
    """See `SearchConfig`. An item is a problem; its value, a tree."""

    def __init__(self, ctx: StageContext) -> None:
        config: SearchConfig = ctx.stage
        self.config = config
        self.problems = ProblemSet(config.task, config.split, config.num_problems)
        self.num_items = len(self.problems)
        super().__init__(ctx)
        scorer, weights = self._scorer()
        self.scorer = None if scorer is None else self.served.agreed(scorer)
        said = [p._replace(id="") for p in self.problems]
        self.data_hash = _hash(said, config.task.identity(), weights)

    def _scorer(self) -> tuple[Scorer | None, str]:
        """What scores, and the hash of its weights."""
        config = self.config.scorer
        match config:
            case VerifierConfig():
                return Verifier(self.reward), ""
            case RulesConfig():
                rules = self.config.task.rules
                assert rules is not None  # see `SearchConfig`
                return ByRules(rules, self.config.task.style), ""
            case RolloutsConfig():
                return Verifier(self.reward, config.samples), ""
            case SelfConsistencyConfig():
                return SelfConsistency(config.extract), ""
            case RewardModelConfig() | ProcessRewardModelConfig():
                return self._model(config)
        return None, ""

    def _model(self, config: RewardModelConfig | ProcessRewardModelConfig) -> tuple[Scorer, str]:
        ctx, where = self.ctx, f"stages.{self.config.name}.scorer.model"
        steps = config.steps if isinstance(config, ProcessRewardModelConfig) else None
        trained = {s.name: s for s in ctx.run.training}.get(config.model)
        if trained is not None and trained.scores_steps != (steps is not None):
            kind = "process_reward_model" if trained.scores_steps else "reward_model"
            raise ConfigError(f"{where}: {config.model} is read otherwise; write kind: {kind}")
        try:
            path = ctx.finished[config.model] if trained is not None else located(config.model)
        except (UserError, KeyError) as error:
            known = ", ".join(ctx.finished) or "none"
            raise ConfigError(
                f"{where}: {config.model} is neither an earlier stage ({known}) nor a model"
            ) from error
        opened = open_model(path)
        model, size = opened.config, ctx.run.model.vocab_size
        assert isinstance(model, DecoderConfig)
        if model.vocab_size == 0:  # a recipe's "the tokenizer's size"
            model = model.model_copy(update={"vocab_size": size})
        scorer = ModelScorer(
            config.kind,
            model,
            opened.tensors,
            ANSWER_CHANCE if steps is None else score_of(steps, ctx.tokenizer),
            size,
            dtype=torch.promote_types(self.dtype, torch.float32),
            device=ctx.device,
            hf_names=False,
        )
        return scorer, folder_hash(path)

    def work(self, items: Sequence[int]) -> list[Any]:
        """See `Job`."""
        trees = [self._tree(i) for i in items]
        seed, config = self.ctx.run.seed, self.config
        search(
            self.generator,
            self.policy,
            config.method,
            self.scorer,
            trees,
            seed=seed,
            name=config.draws or config.name,
            concurrent=self.concurrent,
        )
        self.judge(trees)
        return [tree.record() for tree in trees]

    def _tree(self, item: int) -> Tree:
        problem = self.problems[item]
        prompt = prompt_messages(problem, self.config.task)
        ids, _ = encode_chat(self.ctx.tokenizer, prompt, add_generation_prompt=True)
        return Tree(problem, item, prompt, list(ids))

    def measured(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Accuracy of what was chosen, and of all that was found; cost."""
        above, number = self.config.extract.above, max(len(trees), 1)

        def right(tree: Tree, node: int | None) -> bool:
            score = None if node is None else tree.nodes[node].scores.get(TRUTH)
            return score is not None and score > above

        return {
            "chosen_right": sum(right(t, t.answer) for t in trees) / number,
            "solved": sum(any(right(t, i) for i in t.finished()) for t in trees) / number,
            "answers": sum(len(t.finished()) for t in trees) / number,
            **super().measured(trees),
        }

    def finish(self, records: Sequence[Any]) -> Outcome:
        """See `Job`."""
        config, how = self.config, self.config.extract
        trees = [from_record(r) for r in records]
        scorer = "" if self.scorer is None else self.scorer.name
        worth: extract.Estimate = {
            "answers": extract.by_answers(TRUTH),
            "value": extract.by_value,
            "score": extract.by_score(scorer),
        }[how.worth]
        separator = config.step.separator
        problems = (
            extract.problem_row(
                t, TRUTH, above=how.above, lowest=how.lowest_solve_rate,
                highest=how.highest_solve_rate,
            )
            for t in trees
        )  # fmt: skip

        def each(rows: Any) -> list[dict[str, Any]]:
            return list(itertools.chain.from_iterable(rows))

        sft = (extract.sft_rows(t, TRUTH, above=how.above, most=how.sft_per_problem) for t in trees)
        pairs = (extract.pairs(t, TRUTH, margin=how.margin, estimate=worth) for t in trees)
        steps = (extract.step_rows(t, separator, worth, labels=config.labels) for t in trees)
        rows = {
            "trees": records,
            "answers": each(extract.answer_rows(t, TRUTH) for t in trees),
            "sft": each(sft),
            "pairs": each(pairs),
            "steps": each(steps),
            "problems": [row for row in problems if row is not None],
        }
        return Outcome(rows, self.measured(trees))


@dataclasses.dataclass(frozen=True)
class _Given:
    """A solution to be labelled: its problem, its steps as texts and as tokens."""

    problem: Problem
    prompt: list[dict[str, Any]]
    steps: list[str]
    encoded: Solution


class LabelStepsJob(_SearchJob):
    """See `LabelStepsConfig`. An item is a solution; its value, a tree of one branch."""

    config: LabelStepsConfig

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        self.given = list(self._read(ctx))
        self.num_items = len(self.given)
        self.data_hash = _hash([[g.problem, g.encoded.answer] for g in self.given])
        super().__init__(ctx)

    def _read(self, ctx: StageContext) -> Iterator[_Given]:
        """Raises DataError, with file and row, for a row that is no solution."""
        separator = self.config.step.separator
        for source in self.config.data.sources:
            for where, row in source.told(("prompt-completion",)).rows():
                text = row.get("completion")
                if isinstance(text, str) and not text.strip():
                    continue  # an answer that says nothing has no step to label
                try:
                    given = _given(ctx, row, separator)
                    self._check_room(given.encoded)
                    yield given
                except DataError as error:
                    raise DataError(f"{where}: {error}") from error

    def _check_room(self, encoded: Solution) -> None:
        """Refuse a solution that rollouts could not go on from to its end."""
        limits = {
            "sampling.max_new_tokens": self.config.sampling.max_new_tokens,
            "model.max_seq_len less its prompt": self.ctx.run.model.max_seq_len
            - len(encoded.prompt),
        }
        for what, limit in limits.items():
            if len(encoded.answer) > limit:
                raise DataError(
                    f"the solution has {len(encoded.answer)} tokens, {what} is {limit}; raise it"
                )

    def work(self, items: Sequence[int]) -> list[Any]:
        """See `Job`."""
        trees = [self._tree(i) for i in items]
        scorer = self.served.agreed(Verifier(self.reward, self.config.samples))
        Driver(
            self.generator,
            self.policy,
            methods.label,
            scorer,
            seed=self.ctx.run.seed,
            name=self.config.name,
            concurrent=self.concurrent,
        ).run(trees)
        return [tree.record() for tree in trees]

    def _tree(self, item: int) -> Tree:
        given = self.given[item]
        tree = Tree(given.problem, item, given.prompt, list(given.encoded.prompt))
        tree.nodes += extract.solution_nodes(given.encoded, self.policy.text)
        return tree

    def measured(self, trees: Sequence[Tree]) -> dict[str, float]:
        """Labels and cost."""
        labels = [s for t in trees for n in t.nodes for s in n.scores.values() if s is not None]
        mean = {"label": sum(labels) / len(labels)} if labels else {}
        return {**mean, **super().measured(trees)}

    def finish(self, records: Sequence[Any]) -> Outcome:
        """See `Job`. A solution with a step of which nothing can be said is left out."""
        trees = [from_record(r) for r in records]
        rows = []
        for tree, given in zip(trees, self.given, strict=True):
            scores = [n.scores["rollouts"] for n in tree.nodes[1:]]
            known = [min(max(s, 0.0), 1.0) for s in scores if s is not None]
            if len(known) == len(scores):
                hard = self.config.labels == "hard"
                labels = [float(s > 0.0) for s in known] if hard else known
                rows.append({"prompt": given.prompt, "steps": given.steps, "labels": labels})
        return Outcome({"steps": rows}, self.measured(trees))


def _given(ctx: StageContext, row: dict[str, Any], separator: str) -> _Given:
    said = {k: v for k, v in row.items() if v not in (None, [], {})}
    variables = take_variables(said)
    prompt = asked(said.pop("prompt", None), said, [])
    text, answer = said.pop("completion", None), said.pop("answer", None)
    if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
        text = text[0].get("content")
    if not isinstance(text, str) or not text.strip():
        raise DataError("field 'completion' is no text with steps")
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise DataError("field 'answer' is missing; rollouts are held against it. Write the text")
    steps = [step for step in text.split(separator) if step.strip()]
    zeros = [0.0] * len(steps)
    encoded = encode_solution(ctx.tokenizer, prompt, steps, zeros, separator, **variables)
    question = str(prompt[-1].get("content") or "")
    problem = Problem("", question, answers[0], said, None, tuple(answers[1:]))
    return _Given(problem, prompt, steps, encoded)
