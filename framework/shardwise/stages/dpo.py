"""DPO and its kin: the policy learns from preferences, held against a reference that stands still.

One step: the global batch's rankings, each a row with its prompt once, the reference's
log-probabilities of their tokens, one update. KTO takes the answers one by one, and needs the
policy's KL from the reference before the update: of each prompt with the answers of the one before
it in the global batch, so that no cut of the batch changes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from shardwise.data.preferences import Ranking
from shardwise.data.sampler import Sampler
from shardwise.engines.base import Engine
from shardwise.losses.preference import Answers, PreferenceLoss
from shardwise.optim.schedules import consumed_before, global_batch_at
from shardwise.stages.base import REFERENCE, Stage, StageContext
from shardwise.stages.data_shards import local_batches, measure
from shardwise.stages.dpo_config import DpoConfig
from shardwise.stages.initial_weights import folder_hash
from shardwise.stages.rankings import RankingRows, samples_hash, stage_rankings
from shardwise.stages.reference import stored_logprobs
from shardwise.stages.rollouts import Logprobs

Values = list[list[np.ndarray]]  # of each ranking and answer, a number a token
_LOGPROBS = Logprobs(1.0)


class DpoStage(Stage):
    """See `DpoConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx, self.config = ctx, ctx.stage
        config: DpoConfig = ctx.stage
        self.train, self.held_out = stage_rankings(ctx)
        if not config.loss.paired:
            self.train, self.held_out = (
                [labelled(r) for r in part] for part in (self.train, self.held_out)
            )
        self.order = Sampler(len(self.train), ctx.run.seed, config.name)
        self.engine: Engine = ctx.engine(config.optimizer)
        kind = config.reference_in_use
        self.loss = PreferenceLoss(config.loss, with_reference=kind != "none")
        self.data_hash = samples_hash(self.train, self.held_out)
        self.reference: Engine | None = None
        self.stored: dict[str, Values] = {}
        if kind != "none":
            told = json.dumps([self.data_hash, folder_hash(ctx.initial_checkpoint(REFERENCE))])
            self.data_hash = xxhash.xxh3_128_hexdigest(told.encode())
            self.reference = ctx.frozen(REFERENCE, self.engine)
        if kind == "precomputed":
            self._store()

    def train_step(self, step: int, lr: float) -> dict[str, float]:
        """One update on the rankings of ``step``."""
        batch = self.config.batch
        position, size = consumed_before(batch, step), global_batch_at(batch, step)
        indices = [int(i) for i in self.order.batch(position, size)]
        rankings, ids = [self.train[i] for i in indices], range(position, position + size)
        per_token: dict[str, Any] = {}
        if (known := self._reference_of("train", indices, rankings, ids)) is not None:
            per_token["ref_logprobs_BT"] = known
        if not self.config.loss.paired:
            divergence = self.divergence(rankings, ids)
            self.ctx.watch("divergence", f"step {step + 1}", divergence)
            per_token["baseline_BT"] = [[max(0.0, divergence)] * len(r.answers) for r in rankings]
        rows = self._rows(rankings, ids, per_token)
        batches = local_batches(rows, self.engine, batch.micro_batch)
        metrics = self.engine.forward_backward(batches, self.loss, lr)
        return with_margin(metrics) | {
            "grad_norm": self.engine.step(lr),
            "tokens": float(sum(len(r.prompt) - 1 + sum(map(len, r.answers)) for r in rankings)),
            "samples": float(position + size),
        }

    def validate(self) -> dict[str, float]:
        """Loss and metrics on held-out rankings, as ``val_*``."""
        batch, limit = self.config.batch, self.config.validation.max_batches
        total = min(len(self.held_out), limit * batch.global_batch or len(self.held_out))
        terms: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        sums: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for start in range(0, total, batch.global_batch):
            ids = range(start, min(start + batch.global_batch, total))
            answers = self._measured([self.held_out[i] for i in ids], ids)
            found = self.loss.of(answers)
            terms.update({n: float(v) for n, v in found.sums.items()})
            counts.update({n: float(v) for n, v in self.loss.counts_of(answers).items()})
            sums.update({n: float(v) for n, (v, _) in found.metrics.items()})
            numbers.update({n: float(v) for n, (_, v) in found.metrics.items()})
        if not counts["preference"]:
            return {}
        means = {n: w * terms[n] / (counts[n] or 1.0) for n, w in self.loss.weights.items()}
        metrics = {n: sums[n] / number for n, number in numbers.items() if number}
        told = {"loss": sum(means.values())} | with_margin(metrics)
        return {f"val_{name}": value for name, value in told.items()}

    def divergence(self, rankings: Sequence[Ranking], ids: Sequence[int]) -> float:
        """KTO's estimate of the policy's KL from the reference, in nats an answer: may be below 0.

        On mismatched answers; Ethayarajh et al. 2024, section 4.1. Where a prompt with another's
        answers would be longer than ``batch.seq_len``, its first tokens are left out.
        """
        assert self.reference is not None
        rows = self._rows(mismatched(rankings, self.config.batch.seq_len), ids)
        micro = self.config.batch.micro_batch
        ours, theirs = (
            measure(rows, engine, micro, _LOGPROBS) for engine in (self.engine, self.reference)
        )
        ratios = [
            float((a - b).sum())
            for of_ours, of_theirs in zip(ours, theirs, strict=True)
            for a, b in zip(of_ours, of_theirs, strict=True)
        ]
        return sum(ratios) / len(ratios)

    # --- rows -----------------------------------------------------------------------------------

    def _rows(
        self,
        rankings: Sequence[Ranking],
        ids: Sequence[int],
        per_token: Mapping[str, Any] | None = None,
    ) -> RankingRows:
        return RankingRows(rankings, ids, self.ctx.tokenizer.pad_id, False, per_token or {})

    def _reference_of(
        self, part: str, indices: Sequence[int], rankings: Sequence[Ranking], ids: Sequence[int]
    ) -> Values | None:
        """The reference's log-probabilities of the answers' tokens, as asked or as stored."""
        if part in self.stored:
            return [self.stored[part][i] for i in indices]
        if self.reference is None:
            return None
        micro = self.config.batch.micro_batch
        return measure(self._rows(rankings, ids), self.reference, micro, _LOGPROBS)

    def _store(self) -> None:
        """Ask the reference once for all rankings; it is not needed again."""
        reference, chunk = self.reference, self.config.batch.global_batch
        assert reference is not None

        def ask() -> Values:
            rankings = [*self.train, *self.held_out]
            starts = range(0, len(rankings), chunk)
            parts = [(rankings[i : i + chunk], range(i, i + chunk)) for i in starts]
            asked = [
                measure(self._rows(some, ids), reference, self.config.batch.micro_batch, _LOGPROBS)
                for some, ids in parts
            ]
            return list(itertools.chain(*asked))

        sizes = [len(a) for r in (*self.train, *self.held_out) for a in r.answers]
        flat = stored_logprobs(self.ctx, self.data_hash, sizes, ask)
        known = iter(flat)
        for part, rankings in (("train", self.train), ("held_out", self.held_out)):
            self.stored[part] = [[next(known) for _ in r.answers] for r in rankings]
        reference.close()
        self.reference = None

    def _measured(self, rankings: Sequence[Ranking], ids: Sequence[int]) -> Answers:
        """Held-out answers with what policy and reference say of them, on every rank."""
        rows, micro = self._rows(rankings, ids), self.config.batch.micro_batch
        ours = flat_values(measure(rows, self.engine, micro, _LOGPROBS))
        theirs = self._reference_of("held_out", ids, rankings, ids)
        number = sum(len(r.answers) for r in rankings)
        baseline = None
        if not self.config.loss.paired:
            value = self.divergence(rankings, ids) if len(rankings) > 1 else 0.0
            baseline = torch.full((number,), max(0.0, value), dtype=torch.float64)
        sizes = torch.tensor([len(a) for r in rankings for a in r.answers])
        return Answers(
            ours,
            None if theirs is None else flat_values(theirs),
            torch.repeat_interleave(torch.arange(number), sizes),
            torch.tensor([x for r in rankings for x in r.ratings], dtype=torch.float64),
            torch.tensor([i for i, r in enumerate(rankings) for _ in r.answers]),
            baseline,
        )


def flat_values(values: Values) -> torch.Tensor:
    """The numbers of all answers, in order, float64."""
    return torch.from_numpy(np.concatenate([v for of_row in values for v in of_row]))


def labelled(ranking: Ranking) -> Ranking:
    """For KTO: an answer is desirable if it is rated above the middle of its ranking.

    Of a pair that is the chosen one. An unpaired answer's label stands.
    """
    middle = (max(ranking.ratings) + min(ranking.ratings)) / 2 if len(ranking.ratings) > 1 else 0.5
    return dataclasses.replace(ranking, ratings=[float(r > middle) for r in ranking.ratings])


def mismatched(rankings: Sequence[Ranking], longest: int) -> list[Ranking]:
    """Each prompt, or as much of its end as fits, with the answers of the ranking before it."""
    found = []
    for i, ranking in enumerate(rankings):
        other = rankings[i - 1]
        room = longest - max(map(len, other.answers))
        found.append(dataclasses.replace(other, prompt=ranking.prompt[-room:]))
    return found


def with_margin(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics with the gap between the sides, where it is one between means (KTO)."""
    sides = metrics.get("rewards_chosen"), metrics.get("rewards_rejected")
    if "margin" in metrics or sides[0] is None or sides[1] is None:
        return metrics
    return metrics | {"margin": sides[0] - sides[1]}
