"""The native engine: any layout of one model, accumulation, mixed precision, one update rule."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from shardwise.adapters.served import to_hf_tensors
from shardwise.adapters.targets import is_adapter
from shardwise.adapters.trained import EVERYTHING, Trained
from shardwise.assemble import Assembled, assemble
from shardwise.config.schema import ModelConfig, NativeConfig, OptimizerConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Engine, Scaled, Setup, Share, State
from shardwise.engines.inputs import Cut
from shardwise.engines.named_parameters import NamedParameters
from shardwise.engines.reduction import LossSums, broadcast_from_last, sum_over
from shardwise.engines.shared_base import SharedBase
from shardwise.errors import ShardwiseError
from shardwise.losses.contract import Loss
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import place
from shardwise.ops import comm
from shardwise.ops.fp8_linear import listening
from shardwise.optim.build import build_optimizer, optimizer_tensors, set_lr
from shardwise.optim.fused import InBackward
from shardwise.optim.local import local_step
from shardwise.parallel import data, pipeline, tensor
from shardwise.parallel.mesh import Mesh, place_mesh
from shardwise.precision.loss_scale import DynamicLossScale
from shardwise.precision.policy import Found, narrowest, of_terms, precision_of


def build(setup: Setup) -> Engine | None:
    """See `engines.registry.register_engine`."""
    assert isinstance(setup.config, NativeConfig)
    if setup.beside is not None:
        return cast(Engine, SharedBase(setup.beside))
    ranks = range(setup.layout.world) if setup.ranks is None else setup.ranks
    mesh = place_mesh(setup.layout, setup.device, ranks)
    if mesh is None:
        return None
    return NativeEngine(
        setup.model,
        setup.config,
        mesh,
        seed=setup.seed,
        stage=setup.stage,
        optimizer=setup.optimizer,
        wide_logits=setup.wide_logits,
        trained=setup.trained,
    )


class NativeEngine:
    """One model under one layout. See `engines.base.Engine` for the contract.

    Args:
        model_config: the plain model to build.
        config: layout, precision, recompute, compile, clipping.
        mesh, assembled: of `parallel.mesh.build_mesh`; what holds the masters, if it is made yet.
        seed, stage, optimizer, wide_logits, trained: see `engines.base.Setup`.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: NativeConfig,
        mesh: Mesh,
        *,
        seed: int,
        stage: str = "",
        optimizer: OptimizerConfig | None = None,
        wide_logits: bool = False,
        trained: Trained = EVERYTHING,
        assembled: Assembled | None = None,
    ) -> None:
        assert isinstance(model_config, DecoderConfig)
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.seed, self.stage, self.adapter_config = seed, stage, trained.adapter
        self.data_rank, self.data_size = mesh.data_rank, mesh.data_size
        self.precision = precision_of(config.precision, mesh.device)
        if assembled is None:
            by_block = optimizer is not None and optimizer.in_backward
            assembled = assemble(model_config, config, mesh, seed, trained, by_block=by_block)
        self.chunks, self.adapter = assembled.chunks, assembled.adapter
        if self.precision.logits(wide_logits) != self.precision.compute:
            for chunk in self.chunks.values():
                tensor.widen_logits(chunk)
        self.fp8 = assembled.fp8
        self.named = NamedParameters(assembled, model_config, mesh, trained)
        self.scale = DynamicLossScale() if self.precision.loss_scaling else None
        self._has_gradients = False
        self._terms = 0  # of the sum that a gradient is
        self._seen: dict[str, dict[str, torch.dtype]] = {}  # of logits and reductions
        self.updates = 0  # optimizer steps tried; with the stage's name, the time in rng keys
        self.skipped = 0  # of them, those that left the weights as they were
        self.optimizer = (
            build_optimizer(self.named.parameters.items(), optimizer, mesh) if optimizer else None
        )
        self._fused = self.optimizer if isinstance(self.optimizer, InBackward) else None
        if self._fused is not None:
            waiting = {self.named.parameters[n] for n in self.named.summed_later()}
            self._fused.attach(waiting.__contains__)
        # Where gradients are taken elsewhere than at the weights.
        self._moves: Any = self.optimizer if hasattr(self.optimizer, "begin") else None
        self._has_dropout = model_config != model_config.without_dropout() or (
            self.adapter is not None and self.adapter.has_dropout
        )

    @property
    def model(self) -> nn.Module:
        """The model, where this rank holds one pipeline stage."""
        return next(iter(self.chunks.values()))

    # --- training -------------------------------------------------------------------------------

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """Accumulate the gradients of sum_i w_i * sum_i / count_i over the global batch.

        Counts are reduced over micro-batches and data ranks first (decision 2), so every rank may
        bring its own number of micro-batches as long as ZeRO does not gather per micro-batch; the
        samplers give equal numbers. Raises RuntimeError if no `step` came since the last call:
        what is summed over ranks behind the backward passes would be summed twice.
        """
        if self._fused is not None:
            self._arm(microbatches, lr)
        if self._has_gradients:
            raise RuntimeError(
                "called twice without a step between them; one call takes all micro-batches"
            )
        self._has_gradients = True
        if self._moves:
            self._reshard()  # an evaluation may have gathered weights since
            self._moves.begin()
        self._train(True)
        self.named.refresh_mirror()
        if self.fp8 is not None:
            self.fp8.begin_step(self.updates)
        cuts = [self._cut(batch, loss) for batch in microbatches]
        sums = LossSums(loss, self.mesh, [c.batch for c in cuts])
        run = self._run_pipeline if self.mesh.layout.pp > 1 else self._run_in_turn
        with self._products(training=True), comm.tally() as tally:
            run(cuts, sums)
        self._terms = sums.parts
        seen = tally.dtypes.get(("shard", "reduce_scatter"), set())
        self._seen["reductions"] = {f"reduce_scatter {str(d)[6:]}": d for d in seen}
        self._reshard()
        self.named.finish_gradients()
        quantised = self.fp8.finish_step(self.updates) if self.fp8 is not None else {}
        return sums.reduced() | quantised

    def _run_in_turn(self, cuts: Sequence[Cut], sums: LossSums) -> None:
        for i, cut in enumerate(cuts):
            is_last = i == len(cuts) - 1
            data.before_microbatch(self.model, self.mesh, is_last=is_last)
            self._objective(cut, self._call(self.model, cut), sums).backward()
            if not is_last:
                self._note_waiting(self.model, "between micro-batches")

    def _run_pipeline(self, cuts: Sequence[Cut], sums: LossSums) -> None:
        layout, mesh = self.mesh.layout, self.mesh
        for chunk in self.chunks.values():
            data.before_pipeline(chunk, mesh)
        work = _PipelineWork(self, cuts, lambda i, out: self._objective(cuts[i], out, sums))
        executor = pipeline.Executor(layout, mesh.groups["pp"], work)
        executor.run(pipeline.program(layout, len(cuts)))

    def _note_waiting(self, chunk: nn.Module, name: str) -> None:
        """In which dtype micro-batches' gradients are summed: once, it is the same each time."""
        seen = self._seen.setdefault("gradients", {})
        if not any(key.startswith(name) for key in seen):
            seen[name] = self.precision.gradients
            seen |= {f"{name} {str(d)[6:]}": d for d in data.waiting_dtypes(chunk)}

    def _objective(self, cut: Cut, output: Tensor, sums: LossSums) -> Tensor:
        self._seen["logits"] = {"head": output.dtype}
        return sums.add(cut.logits(output), cut.batch) * self.loss_scale

    def _call(self, chunk: nn.Module, cut: Cut, x_BTD: Tensor | None = None) -> Tensor:
        dropout = chunk.training and self._has_dropout
        seed = self.seed if dropout else None
        arguments = cut.arguments(seed, self.updates, self.stage, self.precision.compute)
        return chunk(**arguments, x_BTD=x_BTD)  # type: ignore[no-any-return]

    def _cut(self, batch: MicroBatch, reader: Callable[..., Any] | None = None) -> Cut:
        return Cut(batch, self.mesh, self.model_config, reader=reader)

    def _arm(self, microbatches: Sequence[MicroBatch], lr: float | None) -> None:
        """Weights are about to move in the backward pass."""
        assert self._fused is not None
        if lr is None or len(microbatches) != 1:
            raise RuntimeError(
                f"optimizer.kind moves weights in the backward pass: it needs the rate before it "
                f"(given: {lr}) and one micro-batch (given: {len(microbatches)})"
            )
        self._reshard()
        set_lr(self._fused, lr)
        self._fused.arm()

    def step(self, lr: float) -> float:
        """Clip to ``max_grad_norm`` and update. Non-finite gradients leave the weights untouched.

        The norm is a global number, so all ranks decide alike.
        """
        assert self.optimizer is not None, "this engine was built without an optimizer"
        self._reshard()  # an evaluation may have gathered weights since
        norm = self.named.grad_norm(self._fused.squares if self._fused else {})
        scale = self.scale.value if self.scale else 1.0
        norm /= scale
        finite = math.isfinite(norm)
        if self._fused is not None and not finite:
            raise ShardwiseError(
                f"update {self.updates + 1}: gradients were not finite, and optimizer.kind has "
                "moved weights by them in the backward pass; lower optimizer.lr, or choose a kind "
                "that can leave an update out, and go on from the last checkpoint"
            )
        if finite:
            limit = self.config.max_grad_norm
            factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
            if factor != 1.0 or scale != 1.0:
                torch._foreach_mul_(self.named.local_gradients(), factor / scale)
            set_lr(self.optimizer, lr)
            local_step(self.optimizer)
        if self._moves:
            self._moves.end()
        if self.scale:
            self.scale.update(found_nonfinite=not finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._has_gradients = False
        self.updates += 1
        self.skipped += not finite
        return norm

    # --- evaluation -----------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        """``fn(logits, batch)`` per micro-batch, without gradient and without dropout.

        The tensors that it returns reach every rank that shares the micro-batches.
        """
        self._train(False)
        self.named.refresh_mirror()
        cuts = [self._cut(batch, fn) for batch in microbatches]
        with self._products(training=False):
            return self._forward(cuts, fn)

    def _forward(
        self, cuts: Sequence[Cut], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        results: list[Tensor | None] = [None] * len(cuts)

        def keep(i: int, output: Tensor) -> Tensor:
            self._seen["logits"] = {"head": output.dtype}
            results[i] = result = fn(cuts[i].logits(output), cuts[i].batch)
            return result

        if self.mesh.layout.pp == 1:
            return [keep(i, self._call(self.model, cut)) for i, cut in enumerate(cuts)]
        layout, group = self.mesh.layout, self.mesh.groups["pp"]
        executor = pipeline.Executor(layout, group, _PipelineWork(self, cuts, keep))
        executor.run(pipeline.forward_program(layout, len(cuts)))
        return broadcast_from_last(results, self.mesh)

    def events(self) -> list[tuple[str, str]]:
        """What happened since the last call, as (kind, text)."""
        if self.fp8 is None:
            return []
        found, self.fp8.events = self.fp8.events, []
        return found

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum a few numbers over the data ranks, in fp64."""
        vector = torch.tensor(list(values), dtype=torch.float64, device=self.mesh.device)
        return [float(v) for v in sum_over(vector, self.mesh.groups["dp"]).tolist()]

    def broadcast(self, value: Any) -> Any:
        """Its ranks are the world's: nobody has to be told."""
        return value

    def _products(self, *, training: bool) -> contextlib.AbstractContextManager[None]:
        """Around the passes of a call."""
        if self.fp8 is None:
            return contextlib.nullcontext()
        return self.fp8.computing(training=training)

    def _train(self, mode: bool) -> None:
        for chunk in self.chunks.values():
            chunk.train(mode)

    def _reshard(self) -> None:
        for chunk in self.chunks.values():
            data.reshard(chunk)

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """``model.<name>`` and ``optim.<name>.<state>`` tensors, and the JSON that goes with them.

        With an adapter, of the model its parameters alone, and a new head.
        The tensors are the live ones: loading writes into them. Gathered copies are freed first,
        so the next forward pass sees what was written.
        """
        self._reshard()
        parameters = self.named.parameters
        whole = self.adapter is None
        tensors = {
            f"model.{n}": p.data
            for n, p in parameters.items()
            if whole or p.requires_grad or is_adapter(n)
        }
        if self.optimizer is not None:
            tensors |= optimizer_tensors(self.optimizer, parameters.items())
        meta: dict[str, Any] = {"updates": self.updates, "skipped": self.skipped}
        nonfinite: frozenset[str] = frozenset()
        if self.fp8 is not None:
            tensors |= dict(self.fp8.tensors())
            meta["fp8"] = self.fp8.state_dict()
            nonfinite = self.fp8.observed
        if self.scale:
            meta["loss_scale"] = self.scale.state_dict()
        return State(tensors, meta, nonfinite)

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Take over ``meta``; the tensors of `state_dict` were filled in place before."""
        meta = state.meta if isinstance(state, State) else state
        self.updates, self.skipped = int(meta["updates"]), int(meta.get("skipped", 0))
        if self.scale and "loss_scale" in meta:
            self.scale.load_state_dict(meta["loss_scale"])
        if self.fp8 is not None and "fp8" in meta:
            self.fp8.load_state_dict(meta["fp8"])

    @torch.no_grad()
    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face names, one at a time; every rank must iterate."""
        self._reshard()
        named = self.named.stream(lambda p: p.data)
        if self.adapter and self.adapter_config and self.adapter_config.merges:
            named = self.adapter.merge(named)
        if dtype is not None:
            named = ((name, value.to(dtype)) for name, value in named)
        yield from to_hf_tensors(self.model_config, named)

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See `engines.base.Engine`; of a full tensor, a rank copies its own part."""
        self._reshard()
        return self.named.load(stream)

    @torch.no_grad()
    def start_adapter(self) -> None:
        """See `engines.base.Engine`; ranks that share a weight come to the same values."""
        if self.adapter is None:
            return
        self._reshard()
        held = self.named.parameters
        names = {*held, *self.named.quantised}
        for name, value in self.adapter.start(self.seed, names, self.named.weight):
            place(held[name].data, lambda rows, v=value: v[rows])  # type: ignore[misc]

    def full(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        self._reshard()
        if kind == "grads" and self._fused is not None:
            return
        pick, trained = functools.partial(self._pick, kind), kind != "weights"
        yield from self.named.stream(pick, trained=trained, own_shapes=trained and kind != "grads")

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        self._reshard()
        if kind in ("grads", "copies") and self._fused is not None:
            return
        for name, parameter in self.named.parameters.items():
            if kind != "weights" and not parameter.requires_grad:
                continue
            value = self._pick(kind, parameter)
            if value is not None:
                yield name, value
        if kind == "weights":
            yield from ((name, kept.part()) for name, kept in self.named.quantised.items())

    def _pick(self, kind: str, parameter: nn.Parameter) -> Tensor | None:
        """None: the optimizer keeps nothing of the kind for it."""
        if kind == "weights":
            return parameter.data
        if kind == "copies":
            return data.copy_of(self.chunks.values(), parameter)
        if kind == "grads":
            return torch.zeros_like(parameter.data) if parameter.grad is None else parameter.grad
        assert self.optimizer is not None
        return self.optimizer.state.get(parameter, {}).get(kind)  # type: ignore[no-any-return]

    @property
    def loss_scale(self) -> float:
        """See `engines.base.Engine`."""
        return self.scale.value if self.scale else 1.0

    def optimizer_states(self) -> list[str]:
        """See `engines.base.Engine`."""
        states = [] if self.optimizer is None else list(self.optimizer.state.values())
        return sorted({kind for s in states for kind, value in s.items() if value.dim()})

    def scales(self) -> Iterator[tuple[str, Tensor]]:
        """See `precision.fp8.Fp8.tensors`."""
        yield from () if self.fp8 is None else self.fp8.tensors()

    def watch_scales(
        self, listener: Callable[[Scaled], None]
    ) -> contextlib.AbstractContextManager[None]:
        """See `engines.base.Engine`."""
        return listening(
            lambda s: listener(Scaled(s.site.path, s.site.part, s.amax_3, s.scale_inv))
        )

    def dtypes(self) -> Found:
        """See `engines.base.Engine`."""
        updated = self.updates > self.skipped  # initial weights may be anything
        kinds = self.optimizer_states() if updated else []
        of_moment, of_grad = of_terms(self._terms)
        # What stands still may be anything, too.
        parameters = {n: p for n, p in self.named.parameters.items() if p.requires_grad}
        master = self.precision.master
        chunks = {f"stage {n}": data.dtypes(chunk) for n, chunk in self.chunks.items()}
        reductions = {n: reduction or master for n, (_, reduction) in chunks.items()}
        return {
            "compute": {n: compute or master for n, (compute, _) in chunks.items()},
            "masters": {n: narrowest(p.data) for n, p in parameters.items() if updated},
            "moments": {
                f"{n} {kind}": of_moment(t)
                for kind in kinds
                for n, p in parameters.items()  # past `held`, which frees gathered weights
                if (t := self._pick(kind, p)) is not None and t.is_floating_point()  # no codes
            },
            "gradients": {n: of_grad(p.grad) for n, p in parameters.items() if p.grad is not None}
            | self._seen.get("gradients", {}),
            "reductions": reductions | self._seen.get("reductions", {}),
            "logits": self._seen.get("logits", {}),
        }

    def share_of(self, batch: MicroBatch) -> Share:
        """See `engines.base.Engine`."""
        cut, layout, rank = self._cut(batch), self.mesh.layout, self.mesh.place["tp"]
        index_t = torch.arange(cut.padded) if cut.index_t is None else cut.index_t.cpu()
        between_t = index_t.chunk(layout.tp)[rank] if layout.sp else index_t
        return Share(index_t, between_t, rank, layout.tp)

    def modules(self) -> list[nn.Module]:
        """One for each pipeline stage held here."""
        return list(self.chunks.values())

    def close(self) -> None:
        """Weights, gradients, optimizer states and compute copies."""
        self.chunks.clear()
        self.named.parameters.clear()
        self.named.quantised.clear()
        self.named.mirror = self.optimizer = self.fp8 = None


class _PipelineWork(pipeline.Work):
    """What one step asks of the engine, micro-batch by micro-batch.

    ``finish(i, output)`` makes of the model's output of micro-batch i what the last pipeline
    stage returns.
    """

    def __init__(
        self, engine: NativeEngine, cuts: Sequence[Cut], finish: Callable[[int, Tensor], Tensor]
    ) -> None:
        self.engine, self.cuts, self.finish = engine, cuts, finish
        self.last = engine.mesh.layout.num_chunks - 1
        self.open = dict.fromkeys(engine.chunks, len(cuts))

    def forward(self, chunk: int, microbatch: int, x: Tensor | None) -> Tensor:
        """See `pipeline.Work`."""
        output = self.engine._call(self.engine.chunks[chunk], self.cuts[microbatch], x)
        return output if chunk < self.last else self.finish(microbatch, output)

    def boundary(self, microbatch: int) -> Tensor:
        """See `pipeline.Work`."""
        return self.cuts[microbatch].activations(self.engine.precision.compute)

    def after_backward(self, chunk: int) -> None:
        """See `pipeline.Work`."""
        self.open[chunk] -= 1
        done = self.open[chunk] == 0
        model = self.engine.chunks[chunk]
        data.after_backward(model, self.engine.mesh, is_last=done)
        if not done:
            self.engine._note_waiting(model, f"stage {chunk} between micro-batches")
