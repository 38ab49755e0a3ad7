"""Which completion lives in which slot: admission by group, finished rows replaced at once."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Literal

from shardwise.errors import UserError

MAX_PREFILL_TOKENS = 8192  # padded tokens of one prefill; bounds its activations


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how many samples of it are wanted. ``prompt_id`` is global: it seeds them."""

    prompt_id: int
    prompt_tokens: Sequence[int]
    num_samples: int = 1
    first_sample_id: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample, as it was drawn: the token ids are never decoded and encoded again.

    ``logprobs[t]`` is the log-probability of ``token_ids[t]`` in the whole distribution at the
    sampling temperature; ``behavior_logprobs[t]`` in what top-k and top-p left, renormalised. A
    stop token is part of ``token_ids``.
    """

    prompt_id: int
    sample_id: int
    prompt_tokens: tuple[int, ...]
    token_ids: list[int]
    logprobs: list[float]
    behavior_logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Admission:
    """One prefill; for each new row, its place in ``requests`` and its completion's number."""

    requests: list[Request]
    source: list[int]
    completions: list[int]


class Scheduler:
    """Hands out waiting requests as slots become free.

    Completions are numbered by request, then by sample. A group that fits the slots at all is
    admitted as a whole, so its prompt is prefilled once; a larger one is cut.
    """

    def __init__(self, requests: Sequence[Request], num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_completions = 0
        self.waiting: deque[tuple[Request, int, int]] = deque()  # request, first, how many
        for request in requests:
            for start in range(0, request.num_samples, num_slots):
                size = min(num_slots, request.num_samples - start)
                self.waiting.append((request, self.num_completions + start, size))
            self.num_completions += request.num_samples

    def admit(self, num_active: int) -> Admission | None:
        """The next prefill that fits beside ``num_active`` rows, if any."""
        free = self.num_slots - num_active
        admission = Admission([], [], [])
        longest = 0
        while self.waiting and self.waiting[0][2] <= free:
            request, first, size = self.waiting[0]
            longest = max(longest, len(request.prompt_tokens))
            padded = longest * (len(admission.requests) + 1)
            if admission.requests and padded > MAX_PREFILL_TOKENS:
                break
            self.waiting.popleft()
            admission.source.extend([len(admission.requests)] * size)
            admission.completions.extend(range(first, first + size))
            admission.requests.append(request)
            free -= size
        return admission if admission.requests else None


def check_requests(requests: Sequence[Request], vocab_size: int, max_seq_len: int) -> None:
    """Raise UserError for a prompt that cannot be continued or a sample asked for twice."""
    names = set()
    for request in requests:
        where = f"prompt {request.prompt_id}"
        if not request.prompt_tokens:
            raise UserError(f"{where} has no tokens; a prompt needs at least one")
        if len(request.prompt_tokens) >= max_seq_len:
            raise UserError(
                f"{where} has {len(request.prompt_tokens)} tokens, the model takes "
                f"{max_seq_len} with the completion: shorten it or raise model.max_seq_len"
            )
        if min(request.prompt_tokens) < 0 or max(request.prompt_tokens) >= vocab_size:
            raise UserError(f"{where} holds a token outside the vocabulary of {vocab_size}")
        if request.num_samples < 1:
            raise UserError(f"{where}: num_samples must be at least 1")
        for sample in range(request.num_samples):
            name = (request.prompt_id, request.first_sample_id + sample)
            if name in names:
                raise UserError(f"{where}: sample {name[1]} is asked for twice")
            names.add(name)
