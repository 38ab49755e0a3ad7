"""Problems in, scored completions out: what GRPO learns from and what accuracy is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shardwise.data.chat import encode_chat
from shardwise.engines.base import Engine
from shardwise.parallel.collectives import gather_json
from shardwise.precision.policy import precision_of
from shardwise.rewards import Problem, RewardItem, Scorer, TaskConfig, prompt_messages
from shardwise.rollout.generator import Generator
from shardwise.rollout.sampling import Sampling
from shardwise.rollout.scheduler import Completion, Request
from shardwise.stages.base import StageContext


@dataclasses.dataclass
class Group:
    """A problem with its completions; the lists below run in parallel, one entry a completion."""

    problem: Problem
    prompt_id: int
    prompt: list[int]
    tokens: list[list[int]]
    logprobs: list[list[float]]  # of the whole distribution, as the sampler saw it
    stopped: list[bool]
    texts: list[str]
    rewards: list[float | None]  # None: unscorable
    policy: str  # checksum of the weights that wrote it
    advantages: list[float] = dataclasses.field(default_factory=list)

    def lengths(self) -> np.ndarray:
        """[completion tokens, completions that stopped, tokens in the training row]."""
        written = sum(map(len, self.tokens))
        return np.array([written, sum(self.stopped), len(self.prompt) - 1 + written], dtype=float)

    def records(self, step: int) -> list[dict[str, Any]]:
        """One JSON record a completion; every token of it carries loss."""
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
                "mask": [True] * len(self.tokens[i]),
                "text": self.texts[i],
                "stopped": self.stopped[i],
                "reward": self.rewards[i],
                "advantage": self.advantages[i] if self.advantages else None,
            }
            for i in range(len(self.tokens))
        ]


class Player:
    """A generator on this rank, fed from the engine's weights, with a scorer behind it."""

    def __init__(
        self,
        ctx: StageContext,
        task: TaskConfig,
        scorer: Scorer,
        dtype: torch.dtype | None = None,
        max_slots: int = 128,
    ) -> None:
        self.ctx, self.task, self.scorer = ctx, task, scorer
        self.dtype = dtype or precision_of(ctx.stage.engine.precision, ctx.mesh.device).compute
        self.generator = Generator(
            ctx.run.model,
            self.dtype,
            ctx.mesh.device,
            max_slots,
            decode_text=ctx.tokenizer.decode,
        )

    def sync(self, engine: Engine) -> None:
        """Take the engine's weights; a collective call.

        The generator checks that what it serves is what it received (a checksum by tensor).
        """
        self.generator.load(engine.weights())

    def play(
        self,
        problems: Sequence[Problem],
        sampling: Sampling,
        num_samples: int,
        key: int,
        prompt_ids: Sequence[int] | np.ndarray,
    ) -> list[Group]:
        """``num_samples`` scored completions of each problem.

        ``key`` and a problem's ``prompt_id`` decide its draws, whatever else is in the batch.
        """
        tokenizer = self.ctx.tokenizer
        prompts = [
            encode_chat(tokenizer, prompt_messages(p, self.task), add_generation_prompt=True)[0]
            for p in problems
        ]
        stops = tuple(dict.fromkeys([*sampling.stop_ids, *tokenizer.stop_ids]))
        sampling = sampling.model_copy(update={"stop_ids": stops})
        # A repeated id pads a rank's share: it is generated once.
        unique = dict(zip(map(int, prompt_ids), prompts))
        requests = [Request(i, p, num_samples) for i, p in unique.items()]
        by_prompt: dict[int, list[Completion]] = {}
        for completion in self._generate(requests, sampling, key):
            by_prompt.setdefault(completion.prompt_id, []).append(completion)
        groups = [
            self._group(problem, int(i), prompt, by_prompt[int(i)])
            for problem, i, prompt in zip(problems, prompt_ids, prompts, strict=True)
        ]
        self._score(groups)
        return groups

    def _generate(self, requests: list[Request], sampling: Sampling, key: int) -> list[Completion]:
        """Ranks that share a slice of the batch (tp, pp, cp) share its generation too."""
        peers = self.ctx.mesh.groups["peers"]
        mine = requests[peers.rank() :: peers.size()]
        completions = self.generator.generate(mine, sampling, key) if mine else []
        if peers.size() == 1:
            return completions
        parts = gather_json([dataclasses.asdict(c) for c in completions], peers)
        return [
            Completion(**c | {"prompt_tokens": tuple(c["prompt_tokens"])})
            for part in parts
            for c in part
        ]

    def _group(self, problem: Problem, prompt_id: int, prompt: list[int], found: Any) -> Group:
        stops = set(self.ctx.tokenizer.stop_ids)
        return Group(
            problem=problem,
            prompt_id=prompt_id,
            prompt=prompt,
            tokens=[c.token_ids for c in found],
            logprobs=[c.logprobs for c in found],
            stopped=[c.finish_reason == "stop" for c in found],
            texts=[
                self.ctx.tokenizer.decode([t for t in c.token_ids if t not in stops]) for c in found
            ],
            rewards=[],
            policy=self.generator.checksum,
        )

    def _score(self, groups: Sequence[Group]) -> None:
        items = [
            RewardItem(g.problem.question, text, g.problem.answer, g.problem.meta, len(tokens))
            for g in groups
            for text, tokens in zip(g.texts, g.tokens, strict=True)
        ]
        results = iter(self.scorer.score(items))
        for group in groups:
            group.rewards = [next(results).value for _ in group.texts]
