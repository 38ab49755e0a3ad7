"""Sequences in flight: what was asked for, what each has drawn, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor

from shardwise.errors import UserError
from shardwise.rollout.config import Sampling
from shardwise.rollout.pages import Cached

# Of a field: its texts hang on the last bits of weights, which layouts round differently.
CHECKSUMS = "checksums"


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how many samples of it are wanted. ``prompt_id`` is global: it seeds them."""

    prompt_id: int
    prompt_tokens: Sequence[int]
    num_samples: int = 1
    first_sample_id: int = 0


FinishReason = Literal["stop", "length", "deadline"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample, as it was drawn: the token ids are never decoded and encoded again.

    ``logprobs[t]`` is the log-probability of ``token_ids[t]`` in the whole distribution at the
    sampling temperature; ``behavior_logprobs[t]`` in what top-k and top-p left, renormalised.
    ``kept_ids[t]`` are the words that they left, ascending (None: sampling does not filter). A
    stop token is part of ``token_ids``. ``policies``: the checksum of the weights and how many of
    the tokens they drew, in order.
    """

    prompt_id: int
    sample_id: int
    prompt_tokens: tuple[int, ...]
    token_ids: list[int]
    logprobs: list[float]
    behavior_logprobs: list[float]
    finish_reason: FinishReason
    kept_ids: list[list[int]] | None = None
    policies: list[tuple[str, int]] = dataclasses.field(
        default_factory=list, metadata={CHECKSUMS: True}
    )


@dataclasses.dataclass(eq=False)
class Group(Cached):
    """A prompt that several sequences go on from, cached for those that have not started.

    ``tokens`` is the whole prompt. ``logits_V`` stand after it, once all of it is cached.
    ``waiting``: the numbers of the sequences that have nothing cached.
    """

    prompt_id: int = 0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    logits_V: Tensor | None = None
    waiting: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(eq=False)
class Drawing(Cached):
    """One sequence. ``tokens`` is the prompt and what was drawn.

    ``limit``: the most tokens to draw. ``logits_V``: of its group, where its first token is drawn
    from; None once there are tokens to compute.
    """

    number: int = 0
    group: Group = dataclasses.field(default_factory=lambda: Group([]))
    sample_id: int = 0
    rng_key: int = 0
    limit: int = 1
    hold: bool = False
    deadline: float | None = None
    stop_strings: StopStrings | None = None
    logits_V: Tensor | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    behavior_logprobs: list[float] = dataclasses.field(default_factory=list)
    kept_ids: list[list[int]] = dataclasses.field(default_factory=list)
    policies: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    @property
    def num_drawn(self) -> int:
        """Tokens behind the prompt."""
        return len(self.logprobs)

    def draw(
        self, token: int, logprob: float, behavior: float, kept: list[int] | None, policy: str
    ) -> FinishReason | None:
        """Add a token; why the sequence ends with it, if it does."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.behavior_logprobs.append(behavior)
        if kept is not None:
            self.kept_ids.append(kept)
        if self.policies and self.policies[-1][0] == policy:
            self.policies[-1] = policy, self.policies[-1][1] + 1
        else:
            self.policies.append((policy, 1))
        if token in self.group.sampling.stop_ids:
            return "stop"
        if self.stop_strings is not None and self.stop_strings.hit(token):
            return "stop"
        return "length" if self.num_drawn == self.limit else None

    def completion(self, reason: FinishReason) -> Completion:
        """What it has become."""
        prompt = len(self.group.tokens)
        return Completion(
            prompt_id=self.group.prompt_id,
            sample_id=self.sample_id,
            prompt_tokens=tuple(self.group.tokens),
            token_ids=self.tokens[prompt:],
            logprobs=self.logprobs,
            behavior_logprobs=self.behavior_logprobs,
            finish_reason=reason,
            kept_ids=self.kept_ids if self.group.sampling.filters else None,
            policies=self.policies,
        )


class StopStrings:
    """Whether a text, which grows by tokens, holds one of some strings.

    A token is decoded with the few before it: what stands between characters, or before the first
    word of a text, belongs to several tokens. What is left of a text is as long as the longest
    string could begin in.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self.strings, self.decode = strings, decode
        self.before: list[int] = []  # tokens whose text is in ``tail``, and which others need
        self.after: list[int] = []  # tokens whose text ends within a character
        self.tail = ""

    def hit(self, token: int) -> bool:
        """Whether one of the strings is there with this token."""
        self.after.append(token)
        known = len(self.decode(self.before)) if self.before else 0
        new = self.decode([*self.before, *self.after])[known:]
        text = self.tail + new
        if any(s in text for s in self.strings):
            return True
        if new and not new.endswith("\ufffd"):
            self.before, self.after = self.after, []
            keep = max(map(len, self.strings)) - 1
            self.tail = text[len(text) - keep :] if keep < len(text) else text
        return False


def check_request(request: Request, before: int, vocab_size: int, max_seq_len: int) -> None:
    """Raise UserError for a prompt that cannot be continued, behind ``before`` tokens."""
    where = f"prompt {request.prompt_id}"
    length = before + len(request.prompt_tokens)
    if not length:
        raise UserError(f"{where} has no tokens; a prompt needs at least one")
    if length >= max_seq_len:
        raise UserError(
            f"{where} has {length} tokens, the model takes {max_seq_len} with the completion: "
            "shorten it or raise model.max_seq_len"
        )
    known = range(vocab_size)
    if any(token not in known for token in (request.prompt_tokens or [0])):
        raise UserError(f"{where} holds a token outside the vocabulary of {vocab_size}")
    if request.num_samples < 1:
        raise UserError(f"{where}: num_samples must be at least 1")


def check_names(requests: Sequence[Request]) -> None:
    """Raise UserError for a sample that is asked for twice."""
    names = set()
    for request in requests:
        for sample in range(request.num_samples):
            name = (request.prompt_id, request.first_sample_id + sample)
            if name in names:
                raise UserError(f"prompt {name[0]}: sample {name[1]} is asked for twice")
            names.add(name)
