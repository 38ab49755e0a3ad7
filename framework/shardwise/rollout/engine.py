"""The rollout protocol: what stages, jobs, evaluations, `generate` and `serve` ask of an engine.

A *sequence* is a prompt with one completion, in flight or held. It is named by a number that the
engine gives it. Sequences of one request share the cache of their prompt; a fork shares that of
the sequence it leaves, up to where it leaves it. What a sequence draws is decided by its request's
ids, its key and the number of its token, never by what else is in flight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from shardwise.rollout.config import Sampling
from shardwise.rollout.sequences import Completion, Request


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a step did to one sequence: its new tokens, and its completion if that ended it.

    ``logprobs``: of the new tokens, as `Completion` has them.
    """

    sequence: int
    token_ids: list[int]
    completion: Completion | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RolloutCounts:
    """Tokens since construction.

    ``computed``: went through the model. ``drawn``: were sampled. ``shared``: stood in a cache that
    another sequence had filled, and were not computed again.
    """

    computed: int = 0
    drawn: int = 0
    shared: int = 0


class RolloutEngine(Protocol):
    """Generates from weights of its own, which it takes over from a trainer's stream.

    Its calls are local to a rank, or to the ranks among which it is sharded: these make the same
    calls in the same order.
    """

    @property
    def checksum(self) -> str:
        """Of the weights that are served; empty: none yet."""
        ...

    @property
    def counts(self) -> RolloutCounts:
        """Since construction."""
        ...

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, hf_names: bool = True
    ) -> str:
        """Take over a stream of full tensors; returns the checksum of what is now served.

        Sequences in flight go on with the new weights, and nothing that the old ones left in a
        cache is read again. Raises CheckpointError when a tensor is missing, unknown or of another
        shape, or when what is served is not what was received.
        """
        ...

    def submit(
        self,
        request: Request,
        sampling: Sampling,
        key: int = 0,
        *,
        hold: bool = False,
        deadline: float | None = None,
    ) -> list[int]:
        """Queue ``request.num_samples`` sequences; their numbers.

        ``hold``: each keeps its cache when it has ended, to be forked, until `release`.
        ``deadline``: of `time.monotonic`; a sequence ends there with what it has (``"deadline"``).
        Raises UserError for a prompt that is empty, too long, or outside the vocabulary.
        """
        ...

    def fork(
        self,
        sequence: int,
        request: Request,
        sampling: Sampling,
        key: int = 0,
        *,
        at: int | None = None,
        hold: bool = False,
        deadline: float | None = None,
    ) -> list[int]:
        """Sequences that go on where a held one was after ``at`` of its completion's tokens.

        None: after all of them. ``request.prompt_tokens``, which may be none, stand behind those.
        In the new completions, all of that is the prompt. Raises UserError, also for a sequence
        that is not held.
        """
        ...

    def step(self) -> list[Progress]:
        """Admit what fits, and give every sequence in flight its next token.

        Empty: nothing is in flight or waits.
        """
        ...

    def release(self, sequence: int) -> None:
        """Forget a sequence: a held one's cache is free, one in flight ends without a word."""
        ...
