"""A rollout engine that has no cache: every sequence goes through the plain model, alone, anew.

What it draws is what the protocol says, from the same random numbers as every other engine; what it
costs is no measure of anything (``counts.shared`` stays 0). It is the oracle of verify, and serves
jobs on the engine of kind ``plain``.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from shardwise.config.schema import ModelConfig
from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import Progress, RolloutCounts
from shardwise.rollout.sampling import choose, row_keys, uniform_at
from shardwise.rollout.sequences import Completion, Request, check_request
from shardwise.rollout.weights import weights_checksum


@dataclasses.dataclass
class _Sequence:
    request: Request
    sample_id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    key: int
    hold: bool
    deadline: float | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    behavior: list[float] = dataclasses.field(default_factory=list)
    kept: list[list[int]] = dataclasses.field(default_factory=list)
    policies: list[str] = dataclasses.field(default_factory=list)  # of each token

    def ended(self, reason: str) -> Completion:
        return Completion(
            prompt_id=self.request.prompt_id,
            sample_id=self.sample_id,
            prompt_tokens=self.prompt,
            token_ids=list(self.tokens),
            logprobs=list(self.logprobs),
            behavior_logprobs=list(self.behavior),
            finish_reason=reason,  # type: ignore[arg-type]
            kept_ids=list(self.kept) if self.sampling.filters else None,
            policies=[(p, len(list(some))) for p, some in itertools.groupby(self.policies)],
        )


class PlainRollout:
    """See `RolloutEngine`."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        decode_text: Callable[[list[int]], str] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dtype, self.decode_text = config, dtype, decode_text
        self.device = torch.device(device)
        with torch.device("meta"):
            model = registry.build(config)
        self.model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
        self.counts, self.checksum = RolloutCounts(), ""
        self.flying: dict[int, _Sequence] = {}
        self.held: dict[int, _Sequence] = {}
        self._next = 0

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, hf_names: bool = True
    ) -> str:
        """See `RolloutEngine`."""
        named = registry.from_hf_tensors(self.config, weights) if hf_names else weights
        arrived = {name: tensor.detach().clone() for name, tensor in named}
        parameters = dict(self.model.named_parameters())
        if odd := sorted(arrived.keys() ^ parameters.keys()):
            raise CheckpointError(f"weights: {odd[0]} did not arrive, or is no parameter")
        for name, tensor in arrived.items():
            parameters[name].copy_(tensor)
        self.checksum = weights_checksum(arrived.items(), self.dtype)
        return self.checksum

    def submit(
        self,
        request: Request,
        sampling: Sampling,
        key: int = 0,
        *,
        hold: bool = False,
        deadline: float | None = None,
    ) -> list[int]:
        """See `RolloutEngine`."""
        return self._add((), request, sampling, key, hold, deadline)

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
        """See `RolloutEngine`."""
        if sequence not in self.held:
            raise UserError(f"sequence {sequence} is not held")
        source = self.held[sequence]
        at = len(source.tokens) if at is None else at
        if not 0 <= at <= len(source.tokens):
            raise UserError(f"sequence {sequence} has {len(source.tokens)} tokens, no {at}")
        before = (*source.prompt, *source.tokens[:at])
        return self._add(before, request, sampling, key, hold, deadline)

    def _add(
        self,
        before: tuple[int, ...],
        request: Request,
        sampling: Sampling,
        key: int,
        hold: bool,
        deadline: float | None,
    ) -> list[int]:
        prompt = (*before, *request.prompt_tokens)
        whole = dataclasses.replace(request, prompt_tokens=prompt)
        check_request(whole, 0, self.config.vocab_size, self.config.max_seq_len)
        if not self.checksum:
            raise UserError("no weights yet")
        if sampling.stop_strings and self.decode_text is None:
            raise UserError("stop_strings need decode_text")
        numbers = list(range(self._next, self._next + request.num_samples))
        self._next += request.num_samples
        for i, number in enumerate(numbers):
            sample = request.first_sample_id + i
            self.flying[number] = _Sequence(request, sample, prompt, sampling, key, hold, deadline)
        return numbers

    @torch.no_grad()
    def step(self) -> list[Progress]:
        """See `RolloutEngine`."""
        return [self._one(number, self.flying[number]) for number in list(self.flying)]

    def _one(self, number: int, sequence: _Sequence) -> Progress:
        late = sequence.deadline is not None and time.monotonic() >= sequence.deadline
        reason = "deadline" if late else self._draw(sequence)
        new, told = ([], []) if late else (sequence.tokens[-1:], sequence.logprobs[-1:])
        if not reason:
            return Progress(number, new, None, told)
        del self.flying[number]
        if sequence.hold:
            self.held[number] = sequence
        return Progress(number, new, sequence.ended(reason), told)

    def _draw(self, sequence: _Sequence) -> str:
        """Draw the next token; why that was the last one, or nothing."""
        sampling = sequence.sampling
        ids_BT = torch.tensor([[*sequence.prompt, *sequence.tokens]], device=self.device)
        positions_BT = torch.arange(ids_BT.shape[1], device=self.device)[None]
        logits_NV = self.model(ids_BT, positions_BT)[:, -1].cpu()
        self.counts.computed += ids_BT.shape[1]
        self.counts.drawn += 1
        name = torch.tensor([sequence.request.prompt_id]), torch.tensor([sequence.sample_id])
        uniform_N = uniform_at(row_keys(sequence.key, *name), torch.tensor([len(sequence.tokens)]))
        *found, left = choose(logits_NV, sampling, uniform_N)
        token, logp, kept = (t.item() for t in found)
        sequence.policies.append(self.checksum)
        sequence.kept += left or []
        sequence.tokens.append(int(token))
        sequence.logprobs.append(logp)
        sequence.behavior.append(kept)
        text = self.decode_text(sequence.tokens) if self.decode_text else ""
        if token in sampling.stop_ids or any(s in text for s in sampling.stop_strings):
            return "stop"
        room = self.config.max_seq_len - len(sequence.prompt)
        full = len(sequence.tokens) >= min(sampling.max_new_tokens, room)
        return "length" if full else ""

    def release(self, sequence: int) -> None:
        """See `RolloutEngine`."""
        self.held.pop(sequence, None)
        self.flying.pop(sequence, None)
