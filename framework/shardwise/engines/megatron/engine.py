"""The megatron engine: Megatron-core computes; here masters and update rule are ours.

Before each pass Megatron's weights are made what the masters are, and behind each backward pass the
masters' gradients what its fp32 buffers hold. So weights, moments and checkpoints are those of the
native engine, name by name, and a run may change between the two. With Megatron's own optimizer,
in `core_engine`, it may as well.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor, nn

from shardwise.config.schema import NativeConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import Setup
from shardwise.engines.inputs import Cut
from shardwise.engines.megatron import model as models
from shardwise.engines.megatron import names
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.engines.native import NativeEngine
from shardwise.engines.reduction import LossSums, broadcast_from_last
from shardwise.losses.contract import Loss
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.blocks import wrap_blocks
from shardwise.parallel.full_tensor import chunk_size
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import split_model
from shardwise.precision.policy import Found

Finish = Callable[[int, Tensor], Any]  # of a micro-batch's number and the last stage's output


class MegatronEngine(NativeEngine):
    """See `engines.base.Engine`. What it inherits is the keeping of masters and their update."""

    deals_out = False  # gradients over data ranks, each of which has a part then

    def __init__(self, setup: Setup, mesh: Mesh, remark: str = "") -> None:
        config = setup.config
        assert isinstance(config, MegatronConfig)
        masters = NativeConfig(
            layout=config.layout,
            precision=config.precision,
            max_grad_norm=config.max_grad_norm,
            compile=False,
            device=config.device,
        )
        super().__init__(
            setup.model,
            masters,
            mesh,
            seed=setup.seed,
            stage=setup.stage,
            wide_logits=setup.wide_logits,
            trained=setup.trained,
            **self._masters(setup),
        )
        assert isinstance(setup.model, DecoderConfig)
        self._untold = [("megatron", remark)] if remark else []
        te = models.uses_te(config, mesh.device)
        self.groups = models.groups_of(mesh)
        self.core_config = models.transformer_config(
            setup.model, mesh, self.precision, finalize_model_grads_func=_sum_gradients
        )
        with self._inside():
            if mesh.device.type == "cuda":
                set_up_trackers(setup.seed, mesh)
            wide = self.precision.logits(setup.wide_logits) != self.precision.compute
            parts = models.build_parts(setup.model, self.core_config, mesh, te=te, wide_logits=wide)
            for part in parts.values():
                wrap_blocks(part.decoder, config.recompute, compile=False)
            layers = split_model(setup.model, mesh.layout.num_chunks)
            self.places: dict[str, names.Place] = {}
            for number, part in parts.items():
                self.places |= names.places(part, setup.model, layers[number], mesh)
            self.parts: list[Any] = list(parts.values())
            if setup.optimizer is not None:
                self.parts = [self._with_buffers(part) for part in self.parts]
        head, tp = setup.model.head_size, mesh.layout.tp
        # Outputs of the head on this rank: behind them, the vocabulary is filled up.
        self.words = 1 if head == 1 else chunk_size(head, tp, mesh.place["tp"])
        self._start(setup)

    def _masters(self, setup: Setup) -> dict[str, Any]:
        """What the native engine keeps of them."""
        return {"optimizer": setup.optimizer}

    def _start(self, setup: Setup) -> None:
        """With all of Megatron's parts there."""
        missing = set(self.named.parameters) ^ set(self.places)
        assert not missing, f"parameters that only one side has: {sorted(missing)}"

    def _inside(self) -> contextlib.AbstractContextManager[None]:
        """Around calls into Megatron."""
        if self.mesh.device.type != "cpu":
            return contextlib.nullcontext()
        from shardwise.engines.megatron import cpu

        return cpu.computing()

    def _with_buffers(self, part: nn.Module) -> Any:
        """The part with buffers for its gradients, in the dtype that they are summed in."""
        wide = self.precision.gradients == torch.float32
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=wide,
            bucket_size=40_000_000,  # its own default, which some releases take from global state
            use_distributed_optimizer=self.deals_out,
        )
        return DistributedDataParallel(self.core_config, config, part, pg_collection=self.groups)

    # --- training -------------------------------------------------------------------------------

    def forward_backward(
        self, microbatches: Sequence[MicroBatch], loss: Loss, lr: float | None = None
    ) -> dict[str, float]:
        """See `engines.base.Engine`."""
        if self._has_gradients:
            raise RuntimeError("forward_backward was called twice without a step between them")
        self._has_gradients = True
        cuts = self._cuts(microbatches)
        sums = LossSums(loss, self.mesh, [c.batch for c in cuts])
        self._terms = sums.parts
        one = torch.ones((), dtype=torch.int, device=self.mesh.device)  # nobody divides by it

        def finish(i: int, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            if i < len(cuts):
                rows = cuts[i].batch.num_rows
                return self._objective(cuts[i], output[:rows], sums), one, {}
            return output[..., :0].sum(), one, {}  # of what fills a round up

        for part in self.parts:
            part.zero_grad_buffer()
        self._run(cuts, finish, trains=True)
        self._take_gradients()
        return sums.reduced()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for name, master in self.named.parameters.items():
            if master.requires_grad:
                place = self.places[name]
                fused: Tensor = place.parameter.main_grad  # type: ignore[attr-defined]
                master.grad = names.take(place, fused, master.data, self.mesh)

    @torch.no_grad()
    def _send_weights(self) -> None:
        """To what computes, those of now."""
        self._reshard()
        weights = {n: p.data for n, p in self.named.parameters.items()}
        names.load(self.places, weights, self.mesh)

    def _run(self, cuts: Sequence[Cut], finish: Finish, *, trains: bool) -> None:
        """Megatron's schedule over micro-batches, with the weights of now."""
        layout, rows = self.mesh.layout, max(cut.batch.num_rows for cut in cuts)
        if layout.virtual > 1:  # its rounds have as many micro-batches as there are stages
            cuts = [*cuts, *[cuts[-1]] * (-len(cuts) % layout.pp)]
            cuts = [self._filled(cut, rows) for cut in cuts]
        self._send_weights()
        for part in self.parts:
            part.train(trains)
        schedule = schedules.forward_backward_no_pipelining
        if layout.virtual > 1:
            schedule = schedules.forward_backward_pipelining_with_interleaving
        elif layout.pp > 1:
            schedule = schedules.forward_backward_pipelining_without_interleaving
        numbers = [iter(range(len(cuts))) for _ in self.parts]
        options: dict[str, Any] = {}
        if layout.pp > 1:
            options["p2p_communicator"] = P2PCommunicator(self.groups.pp, self.core_config)
        with self._inside():
            schedule(
                forward_step_func=functools.partial(self._step_forward, cuts, finish),
                data_iterator=numbers,
                model=self.parts,
                num_microbatches=len(cuts),
                seq_length=cuts[0].padded,
                micro_batch_size=rows,
                forward_only=not trains,
                collect_non_loss_data=not trains,
                pg_collection=self.groups,
                **options,
            )

    def _cuts(self, microbatches: Sequence[MicroBatch]) -> list[Cut]:
        """Of equal length where stages cannot tell each other how long they are.

        Between two ranks, what an interleaved schedule sends forward and backward at once would
        get each other's shapes.
        """
        if self.mesh.layout.virtual == 1 or not microbatches:
            return [self._cut(batch) for batch in microbatches]
        longest = max(batch.input_ids_BT.shape[1] for batch in microbatches)
        return [Cut(batch, self.mesh, self.model_config, longest) for batch in microbatches]

    def _filled(self, cut: Cut, rows: int) -> Cut:
        """With its last row again, up to ``rows``."""
        index_B = torch.arange(rows).clamp_max(cut.host.num_rows - 1)
        filled = cut.host.map(lambda x: x[index_B])
        return Cut(filled, self.mesh, self.model_config, cut.padded)

    def _step_forward(
        self, cuts: Sequence[Cut], finish: Finish, numbers: Iterator[int], part: nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        """A micro-batch through a part of the model; Megatron calls what comes with the output."""
        i = next(numbers)
        inputs, seen = models.seen(cuts[i], self.precision.compute)
        output = part(**inputs, attention_mask=seen)
        return output, lambda out, **_: finish(i, out[..., : self.words])

    # --- evaluation -----------------------------------------------------------------------------

    def _forward(
        self, cuts: Sequence[Cut], fn: Callable[[Any, MicroBatch], Tensor]
    ) -> list[Tensor]:
        cuts = self._cuts([cut.host for cut in cuts])
        results: list[Tensor | None] = [None] * len(cuts)

        def keep(i: int, output: Tensor) -> None:
            self._seen["logits"] = {"head": output.dtype}
            if i < len(cuts):
                rows = cuts[i].batch.num_rows
                results[i] = fn(cuts[i].logits(output[:rows]), cuts[i].batch)

        if cuts:
            self._run(cuts, keep, trains=False)
        if self.mesh.layout.pp > 1:
            return broadcast_from_last(results, self.mesh)
        return [r for r in results if r is not None]

    # --- state ----------------------------------------------------------------------------------

    def held(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """See `engines.base.Engine`."""
        if kind != "copies":
            yield from super().held(kind)
        elif self.precision.compute != self.precision.master:
            yield from ((name, self._copy(name)) for name in self.places)

    def _copy(self, name: str) -> Tensor:
        place, master = self.places[name], self.named.parameters[name].data
        return names.take(place, place.parameter.data, master, self.mesh)

    def events(self) -> list[tuple[str, str]]:
        """Whose optimizer updates, where the recipe leaves it open and it is not Megatron's."""
        found, self._untold = self._untold, []
        return found

    def dtypes(self) -> Found:
        """See `engines.base.Engine`."""
        grads = {
            f"buffer {i}": part.buffers[0].grad_dtype
            for i, part in enumerate(self.parts)
            if isinstance(part, DistributedDataParallel)
        }
        compute = {n: place.parameter.dtype for n, place in self.places.items()}
        return {**super().dtypes(), "compute": compute, "reductions": grads}

    def modules(self) -> list[nn.Module]:
        """None: Megatron's modules have paths of their own."""
        return []

    def close(self) -> None:
        """See `engines.base.Engine`."""
        super().close()
        self.places.clear()
        self.parts.clear()


def set_up_trackers(seed: int, mesh: Mesh) -> None:
    """Nothing is drawn, but on a GPU Megatron's generators must be there."""
    tp = mesh.place["tp"]
    model_parallel_cuda_manual_seed(seed, tp_rank=tp, ep_rank=0, etp_rank=tp)


def _sum_gradients(model: list[Any], num_tokens: Any = None, **options: Any) -> None:
    """What Megatron does behind the backward passes, without its division.

    It would divide by the tokens of a batch; each of our loss terms has a count of its own, and is
    divided by it already.
    """
    del num_tokens
    finalize_model_grads(model, None, **options)
