"""Problems in, scored completions out: what GRPO learns from and what accuracy is measured on."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from shardwise.adapters.registry import build_adapter
from shardwise.config.run import RunConfig
from shardwise.data.chat import encode_chat
from shardwise.engines.base import Engine
from shardwise.errors import CheckpointError, ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.collectives import gather_json
from shardwise.precision.policy import precision_of
from shardwise.rewards import Problem, RewardItem, Scorer, TaskConfig, prompt_messages
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Completion, Request
from shardwise.rollout.sharded import check_tp, group_mesh
from shardwise.rollout.weights import first_unlike
from shardwise.stages.base import StageContext


@dataclasses.dataclass
class Group:
    """A problem with its completions; the lists below run in parallel, one entry a completion."""

    problem: Problem
    prompt_id: int
    prompt: list[int]
    tokens: list[list[int]]
    logprobs: list[list[float]]  # of what was sampled from: with filters, of what they left
    stopped: list[bool]
    texts: list[str]
    rewards: list[float | None]  # None: unscorable
    policy: str  # checksum of the weights that wrote it
    # By name, for each completion a number or one a token; what a loss reads of them.
    per_token: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    reasons: list[str] = dataclasses.field(default_factory=list)  # why unscorable; "": it is not
    kept: list[list[list[int]]] | None = None  # the words that filters left of each token's

    @property
    def num_row_tokens(self) -> int:
        """Tokens in its training row."""
        return len(self.prompt) - 1 + sum(map(len, self.tokens))

    def numbers(self) -> list[float]:
        """All that was written and paid, as numbers: equal for equal groups alone."""
        text = xxhash.xxh32_intdigest(repr([self.problem.id, self.texts, self.reasons]).encode())
        rewards = [math.nan if r is None else r for r in self.rewards]
        flat = [self.prompt_id, text, *self.prompt, *itertools.chain(*self.tokens), *self.stopped]
        flat += np.nan_to_num(np.asarray(rewards, dtype=float), nan=-1e6).tolist()
        return [float(v) for v in flat]

    def unscored(self) -> list[str]:
        """Why completions have no reward; "" for those that have one."""
        reasons = self.reasons or [""] * len(self.rewards)
        return [
            "" if reward is not None else reason or "it was left out"
            for reward, reason in zip(self.rewards, reasons, strict=True)
        ]

    def records(self, step: int) -> list[dict[str, Any]]:
        """One JSON record a completion; ``mask``: which tokens carry loss (none, if unscorable)."""
        reasons = self.unscored()
        return [
            {
                "step": step,
                "prompt_id": self.prompt_id,
                "sample_id": i,
                "policy": self.policy,
                "problem": self.problem.id,
                "question": self.problem.question,
                "answer": self.problem.answer,
                "prompt_tokens": self.prompt,
                "tokens": self.tokens[i],
                "logprobs": self.logprobs[i],
                "mask": [self.rewards[i] is not None] * len(self.tokens[i]),
                "text": self.texts[i],
                "stopped": self.stopped[i],
                "reward": self.rewards[i],
                **({"reason": reasons[i]} if reasons[i] else {}),
                **({"kept": self.kept[i]} if self.kept else {}),
                **{_short(name): _plain(values[i]) for name, values in self.per_token.items()},
            }
            for i in range(len(self.tokens))
        ]


def _item(problem: Problem, text: str, num_tokens: int) -> RewardItem:
    """A completion with what its verifier is told of the problem."""
    _, question, answer, meta, _, others = problem
    return RewardItem(question, text, answer, meta, num_tokens, others)


def _without_problem(group: Group) -> dict[str, Any]:
    fields = dataclasses.fields(group)
    return {f.name: getattr(group, f.name) for f in fields if f.name != "problem"}


def _short(name: str) -> str:
    """A name in a record: ``advantage`` for ``advantages_BT``."""
    return name.removesuffix("_BT").removesuffix("s")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def check_rollout(run: RunConfig, stage: Any, world_size: int) -> None:
    """Raise ConfigError for a stage whose ``rollout.tp`` nobody can have."""
    said, key = getattr(stage, "rollout", RolloutConfig()), f"stages.{stage.name}.rollout.tp"
    assert isinstance(run.model, DecoderConfig)
    check_tp(said.tp, run.model, world_size, key)
    if said.tp > 1 and stage.adapter is not None and not stage.adapter.merges:
        raise ConfigError(
            f"{key}: an adapter of kind {stage.adapter.kind} is not merged, and a generator with "
            "it cannot be cut; set rollout.tp to 1, or take an adapter that merges"
        )


class RolloutWorker:
    """Generators, one a group of `RolloutConfig.tp` ranks, fed from the engine's weights, with a
    scorer behind each.

    The groups share the prompts, whatever the layout of the model that they come from, and every
    rank gets all completions: a rollout is tokens, which are few.
    """

    def __init__(
        self,
        ctx: StageContext,
        task: TaskConfig,
        scorer: Scorer,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.ctx, self.task, self.scorer = ctx, task, scorer
        self.dtype = dtype or precision_of(ctx.precision, ctx.device).compute
        adapter, model = ctx.stage.adapter, ctx.run.model
        said: RolloutConfig = getattr(ctx.stage, "rollout", RolloutConfig())
        check_rollout(ctx.run, ctx.stage, dist.get_world_size())
        self.tp = said.tp
        self.generator = Generator(
            model,
            self.dtype,
            ctx.device,
            said.max_slots,
            max_cache_tokens=said.max_cache_tokens,
            decode_text=ctx.tokenizer.decode,
            adapter=None if adapter is None or adapter.merges else adapter,
            mesh=group_mesh(said.tp, ctx.device),
        )
        self._adapter_arrived = False

    def sync(self, engine: Engine) -> None:
        """Take the engine's weights; a collective call.

        The generator checks that what it serves is what it received (a checksum by tensor). Of
        weights with an adapter in them (or beside them), the first ones are merged here once more,
        and must be those that are served, bit by bit: an adapter that never arrives shows in no
        loss (verl#7495). Raises CheckpointError.
        """
        self.generator.update_weights(engine.weights())
        config = engine.adapter_config
        if config is None or self._adapter_arrived:
            return
        named = engine.full("weights")
        if config.merges:
            named = build_adapter(config, self.ctx.model).merge(named)
        backend = self.generator.backend
        parts = ((name, backend.part(name, value)) for name, value in named)
        unlike = first_unlike(parts, backend.served(), self.dtype)
        if unlike:
            raise CheckpointError(
                f"weights: {unlike} is not served as the base with the adapter of now; what came "
                "is the base alone, stale, another layer's or not all of it"
            )
        self._adapter_arrived = True

    def prompt_of(self, problem: Problem) -> list[int]:
        """The token ids that ask for a problem's answer."""
        messages = prompt_messages(problem, self.task)
        return encode_chat(self.ctx.tokenizer, messages, add_generation_prompt=True)[0]

    def rollout(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        num_samples: int,
        key: int,
        prompt_ids: Sequence[int] | np.ndarray,
    ) -> list[Group]:
        """``num_samples`` scored completions of each problem, on every rank; a collective call.

        ``key`` and a problem's ``prompt_id`` decide its draws, whatever else is in the batch.
        """
        tokenizer = self.ctx.tokenizer
        sampling = sampling.stopping_at(tokenizer.stop_ids)
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = range(rank // self.tp, len(problems), world // self.tp)
        ids = [int(prompt_ids[i]) for i in mine]
        prompts = [self.prompt_of(problems[i]) for i in mine]
        requests = [Request(i, p, num_samples) for i, p in zip(ids, prompts, strict=True)]

        def written() -> list[list[Completion]]:
            found: dict[int, list[Completion]] = {i: [] for i in ids}
            for completion in self.generator.generate(requests, sampling, key):
                found[completion.prompt_id].append(completion)
            return [found[i] for i in ids]

        keys = [f"prompt {i}" for i in ids]
        completions = self.ctx.external(
            "completions", keys, written, questions=prompts, repeatable=True
        )
        groups = [
            self._group(problems[i], id_, prompt, found)
            for i, id_, prompt, found in zip(mine, ids, prompts, completions, strict=True)
        ]
        if rank % self.tp:
            groups = []  # the first of those that have them speaks
        self._score(groups)
        if world == 1:
            return groups
        assert dist.group.WORLD is not None
        parts = gather_json([_without_problem(g) for g in groups], dist.group.WORLD)
        parts = parts[:: self.tp]
        return [
            Group(problem=problem, **parts[i % len(parts)][i // len(parts)])
            for i, problem in enumerate(problems)
        ]

    def _group(self, problem: Problem, prompt_id: int, prompt: list[int], found: Any) -> Group:
        stops = set(self.ctx.tokenizer.stop_ids)
        return Group(
            problem=problem,
            prompt_id=prompt_id,
            prompt=prompt,
            tokens=[c.token_ids for c in found],
            logprobs=[c.behavior_logprobs for c in found],
            kept=None if found[0].kept_ids is None else [c.kept_ids for c in found],
            stopped=[c.finish_reason == "stop" for c in found],
            texts=[
                self.ctx.tokenizer.decode([t for t in c.token_ids if t not in stops]) for c in found
            ],
            rewards=[],
            policy=self.generator.checksum,
        )

    def _score(self, groups: Sequence[Group]) -> None:
        items = [
            _item(g.problem, text, len(tokens))
            for g in groups
            for text, tokens in zip(g.texts, g.tokens, strict=True)
        ]
        keys = [f"prompt {g.prompt_id} sample {i}" for g in groups for i in range(len(g.texts))]
        asked = [dataclasses.asdict(item) for item in items]
        answers = self.ctx.external(
            "scores", keys, lambda: self.scorer.score(items), questions=asked, repeatable=True
        )
        results = iter(answers)
        for group in groups:
            found = [next(results) for _ in group.texts]
            group.rewards = [r.value for r in found]
            group.reasons = [r.reason for r in found]
