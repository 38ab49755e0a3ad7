"""The plain engine: a model, autograd and `torch.optim` in one process. The oracle of verify.

It is written to be read beside the papers, and shares nothing with the native engine but the model,
its initial weights and the loss functions: what both compute alike is no accident of common code.

- One global count a loss term, over the whole batch; each term's sum is divided once.
- Mixed precision (Micikevicius et al. 2018): fp32 weights, a differentiable cast of them to the
  compute dtype, dynamic loss scaling for fp16.
- Gradients are clipped by their global norm (Pascanu et al. 2013, section 3.2).
- Optimizers as PyTorch has them, a tensor at a time (`plain_groups`), or else written from the
  papers (`plain_optimizers`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from shardwise.adapters.served import to_hf_tensors
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Scaled, Setup, Share, State
from shardwise.engines.plain_adapters import PlainBottleneck, PlainLowRank, freeze, plain_adapter
from shardwise.engines.plain_batch import documents, join, pad
from shardwise.engines.plain_config import PlainConfig
from shardwise.engines.plain_domains import PlainFp8
from shardwise.engines.plain_groups import build_optimizer
from shardwise.engines.plain_quantised import as_quantised, is_quantised
from shardwise.errors import CheckpointError, ConfigError, ShardwiseError
from shardwise.losses.contract import Loss
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import init_weights
from shardwise.ops import rng
from shardwise.ops.attention import BRANCH_SHIFT
from shardwise.precision.policy import Found, narrowest, of_terms, precision_of

# Shape suffixes: B sequences, T tokens, n tokens of a document, V vocabulary.

PADDING = 5  # tokens more, of ``split: padded``
FIRST_SCALE, LEAST_SCALE, MOST_SCALE = 2.0**16, 2.0**-14, 2.0**24
GOOD_STEPS = 2000  # until the loss scale doubles


def build(setup: Setup) -> PlainEngine | None:
    """See `engines.registry.register_engine`."""
    if setup.ranks is not None and torch.distributed.get_rank() not in setup.ranks:
        return None
    return PlainEngine(setup)


class PlainEngine:
    """See `engines.base.Engine`, and `engines.plain_config` for the keys."""

    data_rank, data_size = 0, 1

    def __init__(self, setup: Setup) -> None:
        assert isinstance(setup.model, DecoderConfig) and isinstance(setup.config, PlainConfig)
        self.setup, self.config, self.model_config = setup, setup.config, setup.model
        if setup.config.split == "documents" and getattr(setup.model, "attn_dropout", 0) > 0:
            raise ConfigError(
                "engine.split: documents, but the noise of model.attn_dropout depends on where in "
                "a row a document stands; set attn_dropout to 0, or split otherwise"
            )
        self.precision = precision_of(setup.config.precision, setup.device)
        with setup.device:
            self.model = registry.build(setup.model).to(self.precision.master)
        init_weights(self.model, setup.seed)
        self.adapter: PlainLowRank | PlainBottleneck | None = None
        self.adapter_config = setup.trained.adapter
        self.few_bits: str | None = None
        if setup.trained.adapter is not None:
            self.adapter = plain_adapter(setup.trained.adapter, self.model)
            self.few_bits = setup.trained.adapter.quantise
        if setup.trained.freeze is not None:
            freeze(self.model, setup.trained.freeze)
        self.parameters = dict(self.model.named_parameters())
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        if self.few_bits is not None:
            self.load_weights([(n, p.data.clone()) for n, p in self.parameters.items()])
        if self.precision.logits(setup.wide_logits) != self.precision.compute:
            head: Any = self.model.head
            head.forward = lambda x: F.linear(x.float(), head.weight.float())
        self.fp8: PlainFp8 | None = None
        if setup.config.fp8 is not None:
            domains = setup.config.domains
            self.fp8 = PlainFp8(setup.config.fp8, domains, self.model, setup.device)
        self.has_dropout = setup.model != setup.model.without_dropout() or (
            self.adapter is not None and self.adapter.has_dropout
        )
        self.optimizer: Any = None  # of torch.optim, or a reference
        if setup.optimizer is not None:
            self.optimizer = build_optimizer(self.trained, setup.optimizer)
        self.scale = FIRST_SCALE if self.precision.loss_scaling else 1.0
        self.good_steps = 0  # since the scale changed
        self.updates = self.skipped = 0
        self.terms = 0  # of the sum that a gradient is
        self.logits_dtype = self.precision.compute

    # --- training -------------------------------------------------------------------------------

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """Gradients of sum_i w_i * sum_i / count_i over the batch, times the loss scale."""
        batches = [b.to(self.setup.device) for b in microbatches]
        if self.fp8 is None:
            batches = [join(batches)]
        else:  # a micro-batch is a scaling domain of its own
            self.fp8.begin_update(self.updates)
        counts = dict.fromkeys(loss.weights, 0.0)
        for batch in batches:
            counts = {n: counts[n] + float(c) for n, c in loss.counts(batch).items()}
        # A term without a single valid element is a sum of nothing.
        counts = {n: c or 1.0 for n, c in counts.items()}
        sums = dict.fromkeys(counts, 0.0)
        metrics: dict[str, tuple[float, float]] = {}
        parts = [p for b in batches for p in self._parts(b)]
        self.terms = len(parts)
        if hasattr(self.optimizer, "begin"):  # gradients are taken elsewhere than at the weights
            self.optimizer.begin()
        for part in parts:
            logits_BTV = self._logits(part, training=True)
            self.logits_dtype = logits_BTV.dtype
            output = loss(logits_BTV, part)
            terms = [loss.weights[n] / counts[n] * s for n, s in output.sums.items()]
            (torch.stack(terms).sum() * self.scale).backward()
            for name, value in output.sums.items():
                sums[name] += value.item()
            for name, (top, bottom) in output.metrics.items():
                a, b = metrics.get(name, (0.0, 0.0))
                metrics[name] = (a + top.item(), b + bottom.item())
        means = {n: sums[n] / counts[n] for n in counts}
        result = {"loss": sum(loss.weights[n] * m for n, m in means.items())}
        if list(means) != ["loss"]:
            result |= {f"loss_{n}": m for n, m in means.items()}
        result |= {n: top / bottom for n, (top, bottom) in metrics.items() if bottom}
        return result | (self.fp8.end_update(self.updates) if self.fp8 is not None else {})

    def step(self, lr: float) -> float:
        """Clip and update, unless a gradient is not finite or ``skip`` says so (a norm of inf)."""
        assert self.optimizer is not None, "this engine was built without an optimizer"
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads)) / self.scale
        if self.updates in self.config.skip:
            norm = math.inf
        finite = math.isfinite(norm)
        if finite:
            limit = self.config.max_grad_norm
            factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
            for grad in grads:
                grad.mul_(factor / self.scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
        if hasattr(self.optimizer, "end"):
            self.optimizer.end()
        self.optimizer.zero_grad()
        self.updates += 1
        self.skipped += not finite
        if self.precision.loss_scaling:
            self._rescale(finite)
        return norm

    def _rescale(self, finite: bool) -> None:
        """Halve the loss scale after an overflow, double it after a long run without."""
        if not finite and self.scale <= LEAST_SCALE:
            raise ShardwiseError(f"gradients are not finite at the smallest scale {LEAST_SCALE}")
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale = max(self.scale / 2, LEAST_SCALE)
        elif self.good_steps >= GOOD_STEPS:
            self.scale, self.good_steps = min(self.scale * 2, MOST_SCALE), 0

    # --- the model ------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """``fn(logits, batch)`` of each micro-batch, without dropout."""
        found = []
        for batch in (b.to(self.setup.device) for b in microbatches):
            num_tokens = batch.input_ids_BT.shape[1]
            parts = [self._logits(p, training=False)[:, :num_tokens] for p in self._parts(batch)]
            found.append(fn(torch.cat(parts), batch))
        return found

    def _parts(self, batch: MicroBatch) -> list[MicroBatch]:
        """How a batch is cut, by ``split``; documents are cut in `_logits`."""
        if self.config.split == "rows":
            return batch.split(1)
        num_tokens = batch.input_ids_BT.shape[1]
        if self.config.split == "padded":
            return [pad(batch, num_tokens + PADDING)]
        if self.fp8 is not None:
            return [pad(batch, -(-num_tokens // self.fp8.multiple) * self.fp8.multiple)]
        return [batch]

    def _logits(self, batch: MicroBatch, *, training: bool) -> Tensor:
        """BTV; with ``split: documents``, zeros where there is padding."""
        num_tokens = batch.input_ids_BT.shape[1]
        keys_BT = None
        if training and self.has_dropout:
            index_T = torch.arange(num_tokens, device=self.setup.device)
            name = self.setup.stage
            keys_BT = rng.token_keys(
                self.setup.seed, self.updates, name, batch.sample_ids_B, index_T
            )
        ids_BT, positions_BT, segments_BT = (
            batch.input_ids_BT,
            batch.position_ids_BT,
            batch.segment_ids_BT,
        )
        if self.config.split != "documents" or segments_BT is None:
            return self._call(ids_BT, positions_BT, segments_BT, keys_BT)
        rows = []
        for row in range(batch.num_rows):
            logits: Any = 0.0
            for index_n in documents(segments_BT[row]):
                at = (slice(row, row + 1), index_n)
                branches = bool((segments_BT[at] >> BRANCH_SHIFT).any())
                own_1nV = self._call(
                    ids_BT[at],
                    positions_BT[at],
                    segments_BT[at] if branches else None,
                    None if keys_BT is None else keys_BT[at],
                )
                shape = (num_tokens, own_1nV.shape[-1])
                logits = logits + own_1nV.new_zeros(shape).index_copy(0, index_n, own_1nV[0])
            rows.append(logits)
        return torch.stack(rows)

    def _call(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        segments_BT: Tensor | None,
        keys_BT: Tensor | None,
    ) -> Tensor:
        weights = {n: p.to(self.precision.compute) for n, p in self.parameters.items()}
        inputs, keys = (ids_BT, positions_BT, segments_BT), {"rng_keys_BT": keys_BT}
        return functional_call(self.model, weights, inputs, keys)  # type: ignore[no-any-return]

    # --- state ----------------------------------------------------------------------------------

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        if kind == "copies":  # they are gone behind a pass
            return
        for name, parameter in (self.parameters if kind == "weights" else self.trained).items():
            if kind == "weights":
                yield name, parameter.data
            elif kind == "grads" and self.setup.optimizer and self.setup.optimizer.in_backward:
                return  # as if weights had moved in the backward pass
            elif kind == "grads":
                grad = parameter.grad
                yield name, torch.zeros_like(parameter.data) if grad is None else grad
            else:
                assert self.optimizer is not None
                if kind in self.optimizer.state.get(parameter, {}):
                    yield name, self.optimizer.state[parameter][kind]

    full = held

    @property
    def loss_scale(self) -> float:
        """See `engines.base.Engine`."""
        return self.scale

    def optimizer_states(self) -> list[str]:
        """See `engines.base.Engine`."""
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        return sorted({kind for s in states for kind, value in s.items() if value.dim()})

    def scales(self) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        yield from () if self.fp8 is None else self.fp8.tensors()

    def watch_scales(
        self, listener: Callable[[Scaled], None]
    ) -> contextlib.AbstractContextManager[None]:
        """See `engines.base.Engine`."""
        return contextlib.nullcontext() if self.fp8 is None else self.fp8.listening(listener)

    def dtypes(self) -> Found:
        """See `engines.base.Engine`; one process reduces nothing."""
        updated = self.updates > self.skipped  # initial weights may be anything
        kinds = self.optimizer_states() if updated else []
        of_moment, of_grad = of_terms(self.terms)
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        return {
            "compute": {"cast": self.precision.compute},
            "masters": {n: narrowest(p.data) for n, p in self.trained.items() if updated},
            "moments": {
                f"{n} {kind}": of_moment(t)
                for kind in kinds
                for n, t in self.held(kind)
                if t.is_floating_point()  # codes are what they are
            },
            "gradients": {n: of_grad(g) for n, g in grads.items()},
            "reductions": {},
            "logits": {"head": self.logits_dtype},
        }

    def share_of(self, batch: MicroBatch) -> Share:
        """All of them."""
        index_T = torch.arange(batch.input_ids_BT.shape[1])
        return Share(index_T, index_T)

    def modules(self) -> list[nn.Module]:
        """The model."""
        return [self.model]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        named = self.held("weights")
        if self.adapter is not None and self.adapter.config.merges:
            named = self.adapter.merged(named)
        yield from to_hf_tensors(self.model_config, named)

    def start_adapter(self) -> None:
        """See `engines.base.Engine`."""
        if self.adapter is not None:
            self.adapter.start(self.setup.seed)

    @torch.no_grad()
    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See `engines.base.Engine`."""
        missing = {n: p for n, p in self.parameters.items() if ".adapter." not in n}
        for name, value in stream:
            if name in self.parameters:
                if self.parameters[name].shape != value.shape:
                    raise CheckpointError(f"tensor {name!r} has the shape {tuple(value.shape)}")
                self.parameters[name].copy_(value)
                if self.few_bits is not None and is_quantised(name):
                    left = as_quantised(self.parameters[name].data, self.few_bits)
                    self.parameters[name].copy_(left)
                missing.pop(name, None)
        return list(missing)

    def state_dict(self) -> State:
        """Under the names that every engine gives them, so that a checkpoint is anybody's."""
        saved = self.parameters
        if self.adapter is not None:
            saved = {n: p for n, p in saved.items() if ".adapter." in n or p.requires_grad}
        tensors = {f"model.{n}": p.data for n, p in saved.items()}
        for name, parameter in self.trained.items():
            state = {} if self.optimizer is None else self.optimizer.state.get(parameter, {})
            tensors |= {f"optim.{name}.{kind}": value for kind, value in sorted(state.items())}
        meta: dict[str, Any] = {"updates": self.updates, "skipped": self.skipped}
        if self.precision.loss_scaling:
            meta["loss_scale"] = {
                "scale": self.scale,
                "good_steps": self.good_steps,
                "num_skipped": self.skipped,
            }
        nonfinite: frozenset[str] = frozenset()
        if self.fp8 is not None:
            tensors |= dict(self.fp8.tensors())
            meta["fp8"] = self.fp8.state_dict()
            # Histories tell of overflows.
            nonfinite = frozenset(n for n in tensors if n.endswith(".amax_history"))
        return State(tensors, meta, nonfinite)

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Take over ``meta``; the tensors of `state_dict` were filled in place before."""
        meta = state.meta if isinstance(state, State) else state
        self.updates, self.skipped = int(meta["updates"]), int(meta.get("skipped", 0))
        if self.precision.loss_scaling and "loss_scale" in meta:
            self.scale = float(meta["loss_scale"]["scale"])
            self.good_steps = int(meta["loss_scale"]["good_steps"])
        if self.fp8 is not None and "fp8" in meta:
            self.fp8.load_state_dict(meta["fp8"])

    # --- what one process has nothing to do for --------------------------------------------------

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """There is one data rank."""
        return [float(v) for v in values]

    def broadcast(self, value: Any) -> Any:
        """See `engines.base.Engine`."""
        return value

    def events(self) -> list[tuple[str, str]]:
        """What its quantised products have to tell."""
        if self.fp8 is None:
            return []
        found, self.fp8.events = self.fp8.events, []
        return found

    def close(self) -> None:
        """Weights, gradients and optimizer states."""
        self.parameters.clear()
        self.trained.clear()
        del self.model, self.optimizer
