"""The rollout engine: batched generation with a KV cache and continuous batching."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from shardwise.adapters.registry import build_adapter
from shardwise.adapters.served import from_hf_tensors
from shardwise.config.adapters import AdapterConfig
from shardwise.config.schema import ModelConfig
from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry
from shardwise.rollout import native
from shardwise.rollout.backends import PlainBackend
from shardwise.rollout.config import Sampling
from shardwise.rollout.sampling import row_keys, uniform_at
from shardwise.rollout.scheduler import Admission, Completion, Request, Scheduler, check_requests
from shardwise.rollout.weights import combine, digest

log = logging.getLogger(__name__)
MAX_SLOTS = 128  # sequences in flight, of a stage's rollouts

# Shape suffixes: B prompts, T tokens, N active rows, C completions, V vocabulary.


class Generator:
    """Generates completions from weights of its own.

    ``max_slots`` bounds the sequences in flight. ``decode_text`` (ids to text) is needed for stop
    strings alone. ``accelerate`` lets a CPU use the compiled step of `native.py`;
    ``backend_note`` says what is used, and why. ``adapter``: one that cannot be merged; its
    parameters come with the weights.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_slots: int = MAX_SLOTS,
        *,
        decode_text: Callable[[list[int]], str] | None = None,
        accelerate: bool = True,
        adapter: AdapterConfig | None = None,
    ) -> None:
        if max_slots < 1:
            raise UserError("max_slots must be at least 1")
        self.config, self.dtype, self.max_slots = model_config, dtype, max_slots
        self.device = torch.device(device)
        self.decode_text = decode_text
        with torch.device("meta"):
            model = registry.build(model_config)
        if adapter is not None:
            build_adapter(adapter, model.config).attach(model)
        model = model.to(dtype).to_empty(device=self.device).eval().requires_grad_(False)
        why_not = native.unavailable(model, dtype, self.device)
        if not accelerate:
            why_not = "not asked for"
        self.backend = PlainBackend(model) if why_not else native.NativeBackend(model)
        self.backend_note = f"plain PyTorch: {why_not}" if why_not else "native CPU step"
        self.mismatch = ""  # in what the native step differs from the model, once that is known
        self._compared = why_not is not None
        self.checksum = ""  # of the weights that are served
        self.num_prefill_tokens = self.num_decode_steps = 0  # since construction

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]], *, hf_names: bool = True) -> str:
        """Take over a stream of full tensors; returns the checksum of what is now served.

        Compare it with `weights.stream_checksum` of the trainer's stream. Raises CheckpointError
        when a tensor is missing, unknown or of another shape, or when what is served is not what
        was received.
        """
        named = from_hf_tensors(self.config, weights) if hf_names else weights
        parameters = dict(self.backend.model.named_parameters())
        received: dict[str, str] = {}
        for name, tensor in named:
            if name not in parameters:
                raise CheckpointError(f"weights: the model has no parameter {name!r}")
            if parameters[name].shape != tensor.shape:
                raise CheckpointError(
                    f"weights: {name} has shape {tuple(tensor.shape)}, the model needs "
                    f"{tuple(parameters[name].shape)}"
                )
            parameters[name].copy_(tensor)
            received[name] = digest(tensor.to(self.dtype))
        missing = sorted(set(parameters) - set(received))
        if missing:
            raise CheckpointError(f"weights: {', '.join(missing[:5])} did not arrive")
        self.backend.refresh()
        served = {name: digest(tensor) for name, tensor in self.backend.served().items()}
        wrong = sorted(name for name in received if served.get(name) != received[name])
        if wrong:
            raise CheckpointError(f"weights: {wrong[0]} is served otherwise than it was received")
        self.checksum = combine(served)
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

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], sampling: Sampling, rng_key: int = 0
    ) -> list[Completion]:
        """All samples of all requests, in their order.

        ``rng_key`` (see `ops.rng.key`) with the prompt and sample ids decides every draw.
        Raises UserError for a prompt that is empty, too long, or outside the vocabulary.
        """
        if not self.checksum:
            raise UserError("the generator has no weights yet: call load() first")
        if sampling.stop_strings and self.decode_text is None:
            raise UserError("stop_strings need a generator with decode_text")
        check_requests(requests, self.config.vocab_size, self.config.max_seq_len)
        if not requests:
            return []
        return _Session(self, requests, sampling, rng_key).run()


class _Session:
    """One call of `Generator.generate`."""

    def __init__(
        self,
        generator: Generator,
        requests: Sequence[Request],
        sampling: Sampling,
        rng_key: int,
    ) -> None:
        self.generator, self.sampling = generator, sampling
        self.backend, self.device = generator.backend, generator.device
        rows = [(r, s) for r in requests for s in range(r.num_samples)]
        self.rows = rows
        slots = min(generator.max_slots, len(rows))
        self.scheduler = Scheduler(requests, slots)
        limits = [
            min(sampling.max_new_tokens, generator.config.max_seq_len - len(r.prompt_tokens))
            for r, _ in rows
        ]
        longest = max(len(r.prompt_tokens) + limit for (r, _), limit in zip(rows, limits))
        self.backend.allocate(slots, (longest + 15) // 16 * 16)
        self.limit_C = self._long(limits)
        ids = self._long([r.prompt_id for r, _ in rows])
        samples = self._long([r.first_sample_id + s for r, s in rows])
        self.keys_C = row_keys(rng_key, ids, samples)
        width = max(limits)
        self.tokens_CT = torch.zeros(len(rows), width, dtype=torch.int64, device=self.device)
        self.logp_CT = torch.zeros(len(rows), width, device=self.device)
        self.kept_CT = torch.zeros(len(rows), width, device=self.device)
        self.count_C = torch.zeros(len(rows), dtype=torch.int64, device=self.device)
        self.stopped_C = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        self.stop_S = self._long(sorted(set(sampling.stop_ids)))
        # Of the active rows: their completion, newest token and its position in the sequence.
        self.completion_N = self._long([])
        self.token_N = self._long([])
        self.position_N = self._long([])

    def _long(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def run(self) -> list[Completion]:
        """Until nothing waits and nothing is in flight."""
        while True:
            while admission := self.scheduler.admit(len(self.completion_N)):
                self._prefill(admission)
            if not len(self.completion_N):
                break
            logits_NV = self.backend.decode(self.token_N, self.position_N)
            self.generator.num_decode_steps += 1
            self.position_N = self.position_N + 1
            self.token_N = self._extend(logits_NV, self.completion_N)
            self._retire()
        return self._completions()

    def _prefill(self, admission: Admission) -> None:
        prompts = [r.prompt_tokens for r in admission.requests]
        lengths = [len(p) for p in prompts]
        padded = [[*p, *[0] * (max(lengths) - len(p))] for p in prompts]
        ids_BT = torch.tensor(padded, dtype=torch.int64, device=self.device)
        source, new_N = self._long(admission.source), self._long(admission.completions)
        num_active = len(self.completion_N)
        slots = torch.arange(num_active, num_active + len(new_N), device=self.device)
        lengths_B = self._long(lengths)
        logits_BV = self.backend.prefill(ids_BT, lengths_B, slots, source)
        self.generator.num_prefill_tokens += sum(lengths)
        token_N = self._extend(logits_BV[source], new_N)
        self.completion_N = torch.cat((self.completion_N, new_N))
        self.token_N = torch.cat((self.token_N, token_N))
        self.position_N = torch.cat((self.position_N, lengths_B[source]))
        self._retire()

    def _extend(self, logits_NV: Tensor, completion_N: Tensor) -> Tensor:
        """Choose and record the next token of some rows."""
        index_N = self.count_C[completion_N]
        uniform_N = uniform_at(self.keys_C[completion_N], index_N)
        token_N, logp_N, kept_N = self.backend.choose(logits_NV, self.sampling, uniform_N)
        self.tokens_CT[completion_N, index_N] = token_N
        self.logp_CT[completion_N, index_N] = logp_N
        self.kept_CT[completion_N, index_N] = kept_N
        self.count_C[completion_N] = index_N + 1
        stopped_N = torch.isin(token_N, self.stop_S)
        if self.sampling.stop_strings:
            stopped_N |= self._hits_string(completion_N)
        self.stopped_C[completion_N] = stopped_N
        return token_N

    def _hits_string(self, completion_N: Tensor) -> Tensor:
        decode = self.generator.decode_text
        assert decode is not None
        hits = []
        for c in completion_N.tolist():
            text = decode(self.tokens_CT[c, : int(self.count_C[c])].tolist())
            hits.append(any(s in text for s in self.sampling.stop_strings))
        return torch.tensor(hits, dtype=torch.bool, device=self.device)

    def _retire(self) -> None:
        """Drop finished rows; the last surviving ones move into the holes."""
        c = self.completion_N
        going_on_N = ~self.stopped_C[c] & (self.count_C[c] < self.limit_C[c])
        num_left = int(going_on_N.sum())
        if num_left == len(c):
            return
        rows_N = torch.arange(len(c), device=self.device)
        holes = rows_N[:num_left][~going_on_N[:num_left]]
        movers = rows_N[num_left:][going_on_N[num_left:]]
        if len(holes):
            self.backend.cache.move(movers, holes, int(self.position_N[movers].max()))
        order = rows_N[:num_left].clone()
        order[holes] = movers
        self.completion_N, self.token_N, self.position_N = (
            t[order] for t in (self.completion_N, self.token_N, self.position_N)
        )

    def _completions(self) -> list[Completion]:
        counts, stopped = self.count_C.tolist(), self.stopped_C.tolist()
        tokens, logp, kept = (t.tolist() for t in (self.tokens_CT, self.logp_CT, self.kept_CT))
        return [
            Completion(
                prompt_id=request.prompt_id,
                sample_id=request.first_sample_id + sample,
                prompt_tokens=tuple(request.prompt_tokens),
                token_ids=tokens[c][: counts[c]],
                logprobs=logp[c][: counts[c]],
                behavior_logprobs=kept[c][: counts[c]],
                finish_reason="stop" if stopped[c] else "length",
            )
            for c, (request, sample) in enumerate(self.rows)
        ]
