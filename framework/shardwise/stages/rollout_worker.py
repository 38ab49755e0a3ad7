"""Problems in, scored completions out: what GRPO learns from and what accuracy is measured on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from shardwise.adapters.registry import build_adapter
from shardwise.data.chat import encode_chat
from shardwise.engines.base import Engine
from shardwise.errors import CheckpointError
from shardwise.parallel.collectives import gather_json
from shardwise.precision.policy import precision_of
from shardwise.rewards import Problem, RewardItem, Scorer, TaskConfig, prompt_messages
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.rollout.sequences import Completion, Request
from shardwise.rollout.weights import first_unlike
from shardwise.stages.base import StageContext
from shardwise.stages.groups import Group
from shardwise.stages.row_holders import Holders, move
from shardwise.stages.served import serve


def _item(problem: Problem, text: str, num_tokens: int) -> RewardItem:
    """A completion with what its verifier is told of the problem."""
    _, question, answer, meta, _, others = problem
    return RewardItem(question, text, answer, meta, num_tokens, others)


class RolloutWorker:
    """Generators, one a group of `RolloutConfig.tp` ranks, fed from the engine's weights, with a
    scorer behind each.

    The groups share the prompts, whatever the layout of the model that they come from.
    """

    def __init__(
        self,
        ctx: StageContext,
        task: TaskConfig,
        scorer: Scorer,
        dtype: torch.dtype | None = None,
        said: RolloutConfig | None = None,
    ) -> None:
        self.ctx, self.task, self.scorer = ctx, task, scorer
        self.dtype = dtype or precision_of(ctx.precision, ctx.device).compute
        self.served = serve(ctx, self.dtype, said=said, adapter=ctx.stage.adapter)
        self.generator = self.served.generator
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
        need: Holders,
    ) -> list[Group]:
        """``num_samples`` scored completions of each problem; a collective call.

        Every rank gets all groups, with the rows (by number of the problem) that it needs: see
        `Group`. ``key`` and a problem's ``prompt_id`` decide its draws, whatever else is in the
        batch.
        """
        tokenizer = self.ctx.tokenizer
        sampling = sampling.stopping_at(tokenizer.stop_ids)
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = range(self.served.group, len(problems), self.served.groups)
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
        if self.served.place == 0:  # the first of those that have them speaks
            self._score(groups)
        if world == 1:
            return groups
        assert dist.group.WORLD is not None
        said = gather_json([g.statistics() for g in groups], dist.group.WORLD)[:: self.served.tp]
        rows = {i: group.packed() for i, group in zip(mine, groups, strict=True)}
        tp, groups_ = self.served.tp, self.served.groups
        have = [range(r // tp, len(problems), groups_) for r in range(world)]
        rows |= move(rows, have, need, torch.int32)
        found = [
            Group.told(problem, int(prompt_ids[i]), said[i % len(said)][i // len(said)])
            for i, problem in enumerate(problems)
        ]
        for i in need[rank]:
            found[i].unpack(rows[i], self._text_of)
        return found

    def _group(self, problem: Problem, prompt_id: int, prompt: list[int], found: Any) -> Group:
        return Group(
            problem=problem,
            prompt_id=prompt_id,
            prompt=prompt,
            tokens=[c.token_ids for c in found],
            logprobs=[c.behavior_logprobs for c in found],
            kept=None if found[0].kept_ids is None else [c.kept_ids for c in found],
            stopped=[c.finish_reason == "stop" for c in found],
            texts=[self._text_of(c.token_ids) for c in found],
            rewards=[],
            policy=self.generator.checksum,
        )

    def _text_of(self, tokens: Sequence[int]) -> str:
        tokenizer = self.ctx.tokenizer
        return tokenizer.decode([t for t in tokens if t not in tokenizer.stop_ids])

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
