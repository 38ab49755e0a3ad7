"""Rollouts as rows of trees, and what the stages that learn from them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.data.batch import MicroBatch
from shardwise.data.groups import collate_groups
from shardwise.engines.base import Engine
from shardwise.losses.advantages import rewards_tensor
from shardwise.losses.contract import reads_valid
from shardwise.losses.logprobs import KEPT_WORDS, valid_logprobs
from shardwise.losses.scores import Score
from shardwise.metrics.jsonl import line_of
from shardwise.ops.logits import selected_values
from shardwise.rewards import is_usable
from shardwise.stages.data_shards import by_row, forward_shard, hand_over, local_batches
from shardwise.stages.groups import Group
from shardwise.stages.row_holders import Holders, Shares, first_rank, move

PAD_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class RolloutRows:
    """A prompt a row, with all its completions; see `data_shards.Rows`.

    ``per_token`` names the extras that go along. With ``read_at``, a completion's valid tokens are
    where those of its tokens are the *input* whose numbers it lists: there a scalar head is read.
    """

    groups: Sequence[Group]
    row_ids: Sequence[int]
    pad_id: int
    dtype: type[np.floating[Any]] = np.float32
    per_token: tuple[str, ...] = ()
    read_at: Sequence[Sequence[Sequence[int]]] | None = None

    def __len__(self) -> int:
        return len(self.groups)

    def sizes(self, row: int) -> list[int]:
        """Valid tokens of every completion."""
        if self.read_at is not None:
            return list(map(len, self.read_at[row]))
        return self.groups[row].sizes[1:]

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """See `data_shards.Rows`."""
        some = [self.groups[i] for i in rows]
        end = [] if self.read_at is None else [self.pad_id]
        read = self.read_at and [[[n + 1 for n in ends] for ends in self.read_at[i]] for i in rows]
        batch = collate_groups(
            [g.prompt for g in some],
            [[[*t, *end] for t in g.tokens] for g in some],
            np.asarray([self.row_ids[i] for i in rows]),
            self.pad_id,
            pad_multiple=PAD_MULTIPLE,
            per_token={name: [g.per_token[name] for g in some] for name in self.per_token},
            keep=[[b < num_real] * len(g.tokens) for b, g in enumerate(some)],
            valid=read,
            dtype=self.dtype,
        )
        if self.read_at is not None or some[0].kept is None:
            return batch
        return dataclasses.replace(
            batch, extras={**batch.extras, KEPT_WORDS: _kept_words(some, batch.targets_BT.shape)}
        )


def _kept_words(groups: Sequence[Group], shape: tuple[int, ...]) -> Tensor:
    """The words that sampling left (BTK) of each token that is a target; -1 elsewhere."""
    kept = [[words for of_token in g.kept or () for words in of_token] for g in groups]
    most = max(len(words) for of_row in kept for words in of_row)
    out = np.full((*shape, most), -1, dtype=np.int64)
    for row, group, of_row in zip(out, groups, kept, strict=True):
        for target, words in zip(row[len(group.prompt) - 1 :], of_row):
            target[: len(words)] = words
    return torch.from_numpy(out)


@dataclasses.dataclass(frozen=True)
class TrainingRows(RolloutRows):
    """Rows to learn from: an unscorable completion teaches nothing."""

    def collate(self, rows: Sequence[int], num_real: int) -> MicroBatch:
        """See `data_shards.Rows`."""
        batch = super().collate(rows, num_real)
        if all(r is not None for i in rows for r in self.groups[i].rewards):
            return batch
        mask_BT = batch.loss_mask_BT.clone()
        for b, i in enumerate(rows):
            start = len(self.groups[i].prompt) - 1
            for tokens, reward in zip(self.groups[i].tokens, self.groups[i].rewards, strict=True):
                if reward is None:
                    mask_BT[b, start : start + len(tokens)] = False
                start += len(tokens)
        return dataclasses.replace(batch, loss_mask_BT=mask_BT)


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """One forward pass over a rollout, and the name of its numbers: one a token, or a score.

    ``shares``: which rows each rank computes.
    """

    name: str
    engine: Engine
    shares: Shares
    fn: Callable[[Any, MicroBatch], Tensor]
    micro_batch: int
    score: Score | None = None

    def read_at(self, groups: Sequence[Group]) -> list[list[list[int]]] | None:
        """See `RolloutRows`."""
        if self.score is None:
            return None
        return [[self.score.read_at(tokens) for tokens in g.tokens] for g in groups]


def run_forward_passes(
    forward_passes: Sequence[ForwardPass],
    groups: Sequence[Group],
    row_ids: Sequence[int],
    pad_id: int,
    need: Holders,
) -> None:
    """Give groups the numbers of several forward passes: a token's to the ranks that ``need`` the
    row, scores to all.

    All passes run before their results are exchanged, so that roles on disjoint ranks work at
    the same time.
    """
    rows = [RolloutRows(groups, row_ids, pad_id, read_at=r.read_at(groups)) for r in forward_passes]
    shares = [
        forward_shard(local_batches(some, r.engine, r.micro_batch), r.engine, r.fn)
        for some, r in zip(rows, forward_passes, strict=True)
    ]
    for some, share, one in zip(rows, shares, forward_passes, strict=True):
        if one.score is not None:
            _add_scores(one, one.score, groups, some, share)
            continue
        have = one.shares.computed(len(groups))
        for i, found in hand_over(some, one.engine, share, have, need).items():
            groups[i].per_token[one.name] = np.split(found, np.cumsum(some.sizes(i))[:-1])


def _add_scores(
    one: ForwardPass, score: Score, groups: Sequence[Group], rows: RolloutRows, share: np.ndarray
) -> None:
    """Every completion's score, on all ranks."""
    starts = np.cumsum([0, *(len(g.rewards) for g in groups)])
    flat = np.zeros(starts[-1])
    for i, found in by_row(rows, one.engine, share).items():
        scored = map(score.total, np.split(found, np.cumsum(rows.sizes(i))[:-1]))
        flat[starts[i] : starts[i + 1]] = list(scored)
    # Each number comes from one data rank, zeros from the others: a sum is a copy.
    whole = one.engine.sum_over_data(flat.tolist())
    for i, group in enumerate(groups):
        group.per_token[one.name] = whole[starts[i] : starts[i + 1]]


@dataclasses.dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of the valid targets, as `Engine.forward` takes a function."""

    temperature: float

    @reads_valid
    def __call__(self, logits_BTV: Any, batch: MicroBatch) -> Tensor:
        return valid_logprobs(logits_BTV, batch, self.temperature)


def values_of(outputs: Any, batch: MicroBatch) -> Tensor:
    """A scalar head's numbers at the valid tokens."""
    return selected_values(outputs, batch.loss_mask_BT)


def weigh_scores(
    group: Group, verifier_weight: float, model_weight: float, missing_eos_penalty: float = 0.0
) -> None:
    """Rewards become the weighted sum of verifier and reward model, less what a cut-off costs.

    Unscorable where the verifier was. ``per_token`` has ``model_score`` where that has a weight.
    """
    group.per_token["verifier"] = list(group.rewards)
    group.reasons = group.unscored()
    for i, verdict in enumerate(group.rewards):
        score = 0.0
        if verifier_weight:
            if verdict is None:  # with its reason
                continue
            score += verifier_weight * verdict
        if model_weight:
            score += model_weight * group.per_token["model_score"][i]
        if not group.stopped[i]:
            score -= missing_eos_penalty
        # What is no number is unscorable, like a verdict that is missing.
        group.rewards[i] = score if is_usable(score) else None
        group.reasons[i] = "" if is_usable(score) else f"score: {score:g}"


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How a rollout went. A mean over nothing is left out."""
    known = rewards_tensor([g.rewards for g in groups]).numpy()
    count = known.size
    scored = known[np.isfinite(known)]
    n = scored.size
    return {
        **({"reward_mean": float(scored.mean()), "reward_std": float(scored.std())} if n else {}),
        "unscorable_fraction": 1.0 - n / count,
        "completion_length": sum(n for g in groups for n in g.sizes[1:]) / count,
        "stopped_fraction": sum(sum(g.stopped) for g in groups) / count,
        "tokens": float(sum(g.num_row_tokens for g in groups)),
    }


def fractions(parts: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Each (sum, count) divided; what has nothing to count is left out, not 0."""
    return {name: top / bottom for name, (top, bottom) in parts.items() if bottom}


def rollout_file(directory: Path, stage: str, step: int) -> Path:
    """Where a run in ``directory`` stores a rollout (``step`` from 0)."""
    return directory / "rollouts" / stage / f"step_{step:08d}.jsonl"


def gather_records(step: int, groups: Sequence[Group], need: Holders) -> bytes:
    """A rollout as JSON lines: tokens, numbers per token, policy version; on the first rank.

    A collective call: the others send it what they hold.
    """
    lines = {
        i: torch.frombuffer(
            bytearray(b"".join(line_of(r) for r in groups[i].records(step))), dtype=torch.uint8
        )
        for i in need[dist.get_rank()]
    }
    lines |= move(lines, need, first_rank(range(len(groups))), torch.uint8)
    return b"".join(lines[i].numpy().tobytes() for i in sorted(lines))
