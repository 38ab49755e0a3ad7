"""The native rollout engine: a paged KV cache, continuous batching, shared prompts, forks."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from shardwise.adapters.registry import build_adapter
from shardwise.adapters.served import from_hf_tensors
from shardwise.config.adapters import AdapterConfig
from shardwise.config.schema import ModelConfig
from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry
from shardwise.models.common.decoder import Decoder
from shardwise.parallel.full_tensor import local_tensor
from shardwise.parallel.mesh import Mesh
from shardwise.rollout import native
from shardwise.rollout.backends import PlainBackend
from shardwise.rollout.config import MAX_SLOTS, Sampling
from shardwise.rollout.engine import Progress, RolloutCounts
from shardwise.rollout.pages import Cached, PagePool
from shardwise.rollout.sampling import row_keys, uniform_at
from shardwise.rollout.scheduler import Scheduler
from shardwise.rollout.sequences import (
    Completion,
    Drawing,
    Group,
    Request,
    StopStrings,
    check_names,
    check_request,
)
from shardwise.rollout.sharded import ShardedBackend, cut
from shardwise.rollout.weights import combine, digest

log = logging.getLogger(__name__)

# Shape suffixes: B rows of a forward pass, N rows that draw, V vocabulary.


class Generator:
    """A `RolloutEngine` of this process, or of the tensor-parallel ranks of ``mesh``.

    ``max_slots`` bounds the sequences in flight, ``max_cache_tokens`` what is cached of them and
    of held ones (None: as much as they need). ``decode_text`` (ids to text) is needed for stop
    strings alone. ``accelerate`` lets a CPU use the compiled step of `native.py`;
    ``backend_note`` says what is used, and why. ``adapter``: one that cannot be merged; its
    parameters come with the weights, which must be whole then: no ``mesh``.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_slots: int = MAX_SLOTS,
        *,
        max_cache_tokens: int | None = None,
        decode_text: Callable[[list[int]], str] | None = None,
        accelerate: bool = True,
        adapter: AdapterConfig | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        if max_slots < 1:
            raise UserError("max_slots must be at least 1")
        self.config, self.dtype, self.max_slots = model_config, dtype, max_slots
        self.device = torch.device(device)
        self.decode_text = decode_text
        with torch.device("meta"):
            model = registry.build(model_config)
        if adapter is not None:
            if mesh is not None:
                raise UserError("an adapter that is not merged cannot be cut; leave out the mesh")
            build_adapter(adapter, model.config).attach(model)
        model = model.to(dtype)
        if mesh is not None:
            cut(model, mesh)
        model = model.to_empty(device=self.device).eval().requires_grad_(False)
        self.backend, why_not = _backend(model, dtype, self.device, accelerate, mesh)
        self.backend_note = f"plain PyTorch: {why_not}" if why_not else "native CPU step"
        self.mismatch = ""  # in what the native step differs from the model, once that is known
        self._compared = why_not is not None
        self.checksum = ""  # of the weights that are served
        self.max_cache_tokens = max_cache_tokens
        self.counts = RolloutCounts()
        self._next = 0
        self.scheduler = Scheduler(self._new_pool(), max_slots, self.counts)

    def _new_pool(self) -> PagePool:
        backend, tokens = self.backend, self.max_cache_tokens
        pages = None if tokens is None else tokens // backend.page_size
        cache = backend.cache
        return PagePool(backend.page_size, pages, backend.resize, cache.copy, cache.clear)

    @torch.no_grad()
    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, hf_names: bool = True
    ) -> str:
        """See `RolloutEngine`.

        Compare the checksum with `weights.stream_checksum` of the trainer's stream.
        """
        self.scheduler.forget_all()
        self.checksum = ""  # whatever goes wrong here, nothing is served
        named = from_hf_tensors(self.config, weights) if hf_names else weights
        parameters = self.backend.parameters
        received: dict[str, str] = {}
        parts: dict[str, str] = {}  # of those, what this rank serves
        for name, tensor in named:
            if name not in parameters:
                raise CheckpointError(f"weights: the model has no parameter {name!r}")
            if parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"weights: {name} has shape {tuple(tensor.shape)}, the model needs "
                    f"{tuple(parameters[name].shape)}"
                )
            part = self.backend.part(name, tensor)
            local_tensor(parameters[name]).copy_(part)
            received[name] = digest(tensor.to(self.dtype))
            parts[name] = received[name] if part is tensor else digest(part.to(self.dtype))
        missing = sorted(set(parameters) - set(received))
        if missing:
            raise CheckpointError(f"weights: {', '.join(missing[:5])} did not arrive")
        self.backend.refresh()
        served = {name: digest(tensor) for name, tensor in self.backend.served().items()}
        wrong = sorted(name for name in parts if served.get(name) != parts[name])
        if wrong:
            raise CheckpointError(f"weights: {wrong[0]} is served otherwise than it was received")
        self.checksum = combine(received)
        if not self._compared:
            self._compare()
        return self.checksum

    def _compare(self) -> None:
        """Once: hold the native step's logits against the model's; on a difference, fall back."""
        error, bound = native.error_of(self.backend)
        if math.isnan(error):  # weights that are no numbers say nothing; the next ones may
            return
        self._compared = True
        if error > bound:
            self.mismatch = (
                f"the native step's logits differ from the model's by {error:.1e} of their size, "
                f"and rounding explains {bound:.1e}"
            )
            log.warning("%s; the plain model generates instead", self.mismatch)
            self.backend_note = f"plain PyTorch: {self.mismatch}"
            self.backend = PlainBackend(self.backend.model)
            self.scheduler.pool = self._new_pool()  # nothing is cached now

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
        group = Group(list(request.prompt_tokens), prompt_id=request.prompt_id, sampling=sampling)
        return self._add(group, request, key, hold, deadline, 0)

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
        """See `RolloutEngine`.

        The last token of the new prompt is computed in any case, for what follows it.
        """
        parent = self.scheduler.held.get(sequence)
        if parent is None:
            raise UserError(
                f"sequence {sequence} is not held: submit it with hold, and fork it when it has "
                "ended, before its release"
            )
        if at is not None and not 0 <= at <= parent.num_drawn:
            raise UserError(
                f"sequence {sequence} has {parent.num_drawn} tokens; there is no fork at {at}"
            )
        end = len(parent.group.tokens) + (parent.num_drawn if at is None else at)
        tokens = [*parent.tokens[:end], *request.prompt_tokens]
        group = Group(tokens, prompt_id=request.prompt_id, sampling=sampling)
        numbers = self._add(group, request, key, hold, deadline, end)
        self.scheduler.pool.share(parent, group, min(parent.length, end, len(tokens) - 1))
        return numbers

    def _add(
        self,
        group: Group,
        request: Request,
        key: int,
        hold: bool,
        deadline: float | None,
        before: int,
    ) -> list[int]:
        sampling, config, pool = group.sampling, self.config, self.scheduler.pool
        if not self.checksum:
            raise UserError("the generator has no weights yet: call update_weights() first")
        if sampling.stop_strings and self.decode_text is None:
            raise UserError("stop_strings need a generator with decode_text")
        check_request(request, before, config.vocab_size, config.max_seq_len)
        prompt = len(group.tokens)
        limit = min(sampling.max_new_tokens, config.max_seq_len - prompt)
        if pool.max_pages is not None and pool.pages_of(prompt + limit) > pool.max_pages:
            raise UserError(
                f"prompt {request.prompt_id} and its completion take {prompt + limit} tokens of "
                f"the cache, which has {pool.max_pages * pool.page_size}: raise max_cache_tokens, "
                "or lower sampling.max_new_tokens"
            )
        samples = range(request.first_sample_id, request.first_sample_id + request.num_samples)
        ids = torch.tensor(samples)
        keys = row_keys(key, torch.full_like(ids, request.prompt_id), ids).tolist()
        numbers = range(self._next, self._next + request.num_samples)
        self._next = numbers.stop
        for number, sample, rng_key in zip(numbers, samples, keys):
            strings, decode = sampling.stop_strings, self.decode_text
            self.scheduler.add(
                Drawing(
                    list(group.tokens),
                    number=number,
                    group=group,
                    sample_id=sample,
                    rng_key=rng_key,
                    limit=limit,
                    hold=hold,
                    deadline=deadline,
                    stop_strings=StopStrings(strings, decode) if strings and decode else None,
                )
            )
        return list(numbers)

    @torch.inference_mode()
    def step(self) -> list[Progress]:
        """See `RolloutEngine`."""
        scheduler = self.scheduler
        if not self.checksum:  # of an update that failed: what was in flight waits for the next
            raise UserError("the generator has no weights: call update_weights()")
        ended = [Progress(s.number, [], s.completion("deadline")) for s in self._late()]
        scheduler.admit()
        if prompts := scheduler.prompts():
            self.counts.shared -= sum(len(group.pending) for group in prompts)
            for group, logits_V in zip(prompts, self._compute(prompts)):
                group.logits_V = logits_V
        scheduler.start()
        drawing = scheduler.ready()
        if not drawing:
            return ended
        return ended + self._draw(drawing, self._logits(drawing))

    def _late(self) -> list[Drawing]:
        """Sequences whose time is over; they have ended."""
        now = time.monotonic()
        bound = [s for s in self.scheduler.all() if s.deadline is not None]
        bound = [s for s in bound if s.number not in self.scheduler.held]
        if not bound:
            return []
        flags = self.backend.agreed([s.deadline is not None and s.deadline <= now for s in bound])
        late = [s for s, over in zip(bound, flags, strict=True) if over]
        for sequence in late:
            self.scheduler.end(sequence)
        return late

    def _logits(self, drawing: Sequence[Drawing]) -> Tensor:
        """Logits (NV) of the next token of each; those that begin a completion have theirs."""
        pending = [s for s in drawing if s.logits_V is None]
        computed = self._compute(pending) if pending else None
        if computed is not None and len(pending) == len(drawing):
            return computed
        rows = iter(()) if computed is None else iter(computed)
        return torch.stack([next(rows) if s.logits_V is None else s.logits_V for s in drawing])

    def _compute(self, rows: Sequence[Cached]) -> Tensor:
        logits_BV = self.backend.forward(rows)
        for row in rows:
            self.counts.computed += len(row.tokens) - row.length
            row.length = len(row.tokens)
        return logits_BV

    def _draw(self, drawing: list[Drawing], logits_NV: Tensor) -> list[Progress]:
        progress = []
        parts: dict[int, list[int]] = {}  # those that are sampled alike, together
        for i, sequence in enumerate(drawing):
            parts.setdefault(id(sequence.group.sampling), []).append(i)
        for part in parts.values():
            some = [drawing[i] for i in part]
            logits = logits_NV if len(some) == len(drawing) else logits_NV[part]
            keys = torch.tensor([s.rng_key for s in some], device=self.device)
            index = torch.tensor([s.num_drawn for s in some], device=self.device)
            *found, left = self.backend.choose(
                logits, some[0].group.sampling, uniform_at(keys, index)
            )
            rows = zip(some, *(t.tolist() for t in found), left or itertools.repeat(None))
            for sequence, token, logprob, behavior, kept in rows:
                sequence.logits_V = None
                reason = sequence.draw(token, logprob, behavior, kept, self.checksum)
                completion = None
                if reason is not None:
                    completion = sequence.completion(reason)
                    self.scheduler.end(sequence)
                progress.append(Progress(sequence.number, [token], completion, [logprob]))
        self.counts.drawn += len(progress)
        return progress

    def release(self, sequence: int) -> None:
        """See `RolloutEngine`."""
        self.scheduler.remove(sequence)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, key: int = 0
    ) -> list[Completion]:
        """All samples of all requests, in their order; nothing else may be in flight.

        ``key`` (see `ops.rng.key`) with the prompt and sample ids decides every draw. Raises
        UserError as `submit` does.
        """
        if self.scheduler.running or self.scheduler.waiting:
            raise UserError("generate: sequences are in flight; step until they have ended")
        check_names(requests)
        numbers: list[int] = []
        try:
            for request in requests:
                numbers += self.submit(request, sampling, key)
            found: dict[int, Completion] = {}
            while progress := self.step():
                found |= {p.sequence: p.completion for p in progress if p.completion}
        except BaseException:
            for number in numbers:
                self.release(number)
            raise
        return [found[number] for number in numbers]


def _backend(
    model: Decoder, dtype: torch.dtype, device: torch.device, accelerate: bool, mesh: Mesh | None
) -> tuple[PlainBackend, str | None]:
    """What computes, and, unless that is the compiled step, why not."""
    if mesh is not None:
        return ShardedBackend(model, mesh), f"cut among {mesh.layout.tp} ranks"
    why_not = native.unavailable(model, dtype, device) if accelerate else "not asked for"
    return (PlainBackend(model) if why_not else native.NativeBackend(model)), why_not
