"""Bugs to plant, one at a time, by patching in the rank processes. The package holds no hook."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise import assemble
from shardwise.engines import inputs, named_parameters, native, reduction
from shardwise.models.common import init
from shardwise.ops import attention_blocks, comm, cross_entropy
from shardwise.parallel import context, data, mesh, regions, tensor
from shardwise.verify.walk import Task, Walked, walk

Plant = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A mistake that has been made in such code, and where it shows."""

    model: str
    stage: str
    layout: str
    plant: Plant


BUGS: dict[str, Bug] = {}


def bug(model: str, stage: str, layout: str) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        BUGS[plant.__name__] = Bug(model, stage, layout, plant)
        return plant

    return add


def walk_with(name: str, task: Task) -> Walked:
    """`walk.walk` with a bug planted; runs on every rank."""
    with contextlib.ExitStack() as stack:
        for patch in BUGS[name].plant():
            stack.enter_context(patch)
        return walk(task)


def _patch(target: Any, name: str, new: Any) -> Any:
    return mock.patch.object(target, name, new)


# --- tensor and sequence parallel ---------------------------------------------------------------


@bug("llama", "pretrain", "tp2.sp")
def sequence_parallel_norm_gradients_not_reduced() -> Iterator[Any]:
    yield _patch(tensor, "sum_partial", lambda grads, mesh: None)


@bug("llama", "pretrain", "tp4")
def replicated_kv_head_gradients_not_summed() -> Iterator[Any]:
    yield _patch(tensor.SharedHeadLinear, "partial", ())


@bug("llama", "pretrain", "tp2")
def foreign_vocabulary_not_masked() -> Iterator[Any]:
    def forward(self: Any, ids_BT: Tensor) -> Tensor:
        table = tensor.local(self.weight)
        return self.axis.leave(F.embedding((ids_BT - self.start) % table.shape[0], table))

    yield _patch(tensor.VocabEmbedding, "forward", forward)


@bug("gpt2", "pretrain", "tp2.sp")
def dropout_from_the_wrong_rank() -> Iterator[Any]:
    def forward(self: Any, x: Tensor, rng_keys_BT: Tensor | None, salt: int) -> Tensor:
        own = None if rng_keys_BT is None else rng_keys_BT[:, : x.shape[1]]
        return self.old(x, own, salt)

    yield _patch(tensor.TokenDropout, "forward", forward)


@bug("gpt2", "pretrain", "tp2")
def attention_dropout_with_local_head_numbers() -> Iterator[Any]:
    real = tensor.parallelize

    def parallelize(model: Any, *args: Any, **options: Any) -> Any:
        found = real(model, *args, **options)
        for module in model.modules():
            if hasattr(module, "head_offset"):
                module.head_offset = 0
        return found

    yield _patch(tensor, "parallelize", parallelize)


@bug("llama", "sft", "tp2")
def logits_reduced_twice() -> Iterator[Any]:
    def all_reduce(values: Tensor, group: Any, axis: str) -> Tensor:
        return comm.all_reduce(comm.all_reduce(values, group, axis), group, axis)

    yield _patch(cross_entropy, "comm", mock.Mock(all_reduce=all_reduce, all_max=comm.all_max))


@bug("llama", "pretrain", "tp2")
def loss_counted_on_every_tensor_rank() -> Iterator[Any]:
    yield _patch(mesh.Mesh, "speaks", True)


@bug("llama", "pretrain", "tp2")
def input_gradient_not_summed_over_tensor_ranks() -> Iterator[Any]:
    def backward(ctx: Any, grad: Tensor) -> Any:
        regions._finish(ctx.later)
        return grad, None, None

    yield _patch(regions._Enter, "backward", staticmethod(backward))


@bug("llama", "pretrain", "tp2.sp")
def gathered_tokens_gradient_cut_but_not_summed() -> Iterator[Any]:
    def backward(ctx: Any, grad: Tensor) -> Any:
        rank = torch.distributed.get_rank()
        regions._finish(ctx.later)
        return grad.chunk(ctx.size, dim=1)[rank].contiguous(), None, None, None

    yield _patch(regions._GatherTokens, "backward", staticmethod(backward))


@bug("llama", "pretrain", "tp2.sp")
def weight_products_left_for_later_and_forgotten() -> Iterator[Any]:
    yield _patch(regions, "_finish", lambda later: later.pop() if len(later) > 1 else None)


@bug("gpt2", "pretrain", "tp2")
def row_bias_added_on_every_rank() -> Iterator[Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.axis.leave(F.linear(x, tensor.local(self.weight), tensor.local(self.bias)))

    yield _patch(tensor.RowLinear, "forward", forward)


@bug("llama", "pretrain", "tp2")
def initial_weights_drawn_by_local_shape() -> Iterator[Any]:
    real = init.init_tensor

    def init_tensor(name: str, shape: Any, spec: Any, seed: int, rows: Any = None) -> Tensor:
        return real(name, shape, spec, seed + torch.distributed.get_rank(), rows)

    yield _patch(init, "init_tensor", init_tensor)


# --- data parallel and ZeRO ---------------------------------------------------------------------


def _reduce_scatter(change: Callable[[Tensor, int], Tensor]) -> Any:
    real = comm.reduce_scatter

    def reduce_scatter(out: Tensor, inp: Tensor, group: Any, axis: str, *rest: Any) -> Any:
        return real(out, change(inp, group.size()) if axis == "shard" else inp, group, axis, *rest)

    return _patch(comm, "reduce_scatter", reduce_scatter)


@bug("llama", "pretrain", "dp2.zero2")
def mean_over_data_ranks() -> Iterator[Any]:
    yield _reduce_scatter(lambda x, size: x / size)


@bug("llama", "pretrain", "dp2.zero2")
def gradients_reduced_in_bf16() -> Iterator[Any]:
    yield _reduce_scatter(lambda x, size: x.bfloat16().to(x.dtype))


@bug("llama", "sft", "dp2.zero2")
def division_by_local_tokens() -> Iterator[Any]:
    real = reduction.LossSums.__init__

    def start(self: Any, loss: Any, where: Any, batches: Any) -> None:
        real(self, loss, where, batches)
        for name in self.totals:
            local = sum(float(loss.counts(b)[name]) for b in batches)
            self.totals[name] = max(local, 1.0) * where.data_size

    yield _patch(reduction.LossSums, "__init__", start)


@bug("llama", "pretrain", "dp2.zero2")
def clipping_by_a_local_norm() -> Iterator[Any]:
    yield _patch(named_parameters, "sum_over", lambda values, group: values)


@bug("llama", "pretrain", "dp4.hsdp2.zero2")
def replicas_not_summed() -> Iterator[Any]:
    real = data.before_microbatch

    def before(model: Any, *args: Any, **kwargs: Any) -> None:
        real(model, *args, **kwargs)
        model.set_requires_all_reduce(False)

    yield _patch(data, "before_microbatch", before)


@bug("llama", "pretrain", "dp2.zero1")
def only_the_last_micro_batch_counts() -> Iterator[Any]:
    real = data.before_microbatch

    def before(model: Any, where: Any, *, is_last: bool) -> None:
        real(model, where, is_last=is_last)
        for group in data._param_groups(model) if is_last else ():
            for param in group.fsdp_params:
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None

    yield _patch(data, "before_microbatch", before)


@bug("llama", "pretrain", "dp2.zero3")
def optimizer_state_misaligned() -> Iterator[Any]:
    real = native.NativeEngine.step

    def step(self: Any, lr: float) -> float:
        found = real(self, lr)
        parameters = self.named.parameters
        a, b = (
            self.optimizer.state[parameters[f"layers.{i}.mlp.up.weight"]]["exp_avg"] for i in (0, 1)
        )
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
        return found

    yield _patch(native.NativeEngine, "step", step)


# --- pipeline -----------------------------------------------------------------------------------


@bug("llama", "pretrain", "pp2.1f1b")
def tied_embedding_gradient_not_summed() -> Iterator[Any]:
    real = named_parameters.NamedParameters.finish_gradients

    def finish(self: Any) -> None:
        self.shares_tied = False
        real(self)

    yield _patch(named_parameters.NamedParameters, "finish_gradients", finish)


@bug("llama", "pretrain", "pp2.zbv")
def tied_copy_in_a_v_forgotten() -> Iterator[Any]:
    real = named_parameters.NamedParameters.finish_gradients

    def finish(self: Any) -> None:
        if self.mirror is not None:
            self.mirror.grad = None
        real(self)

    yield _patch(named_parameters.NamedParameters, "finish_gradients", finish)


@bug("llama", "pretrain", "pp2.1f1b")
def a_micro_batch_dropped() -> Iterator[Any]:
    real = native._PipelineWork.forward

    def forward(self: Any, chunk: int, microbatch: int, x: Tensor | None) -> Tensor:
        output = real(self, chunk, microbatch, x)
        dropped = chunk == self.last and microbatch == len(self.cuts) - 1
        return output * 0.0 if dropped else output

    yield _patch(native._PipelineWork, "forward", forward)


@bug("llama", "pretrain", "dp2.zero3.pp2.zbv")
def weight_pass_after_zero3_freed_the_weights() -> Iterator[Any]:
    from shardwise.parallel import swapped

    real = swapped._add_grad

    def add(parameter: Tensor, grad: Tensor) -> None:
        freed = tensor.local(parameter).untyped_storage().size() == 0
        real(parameter, grad * 0.0 if freed else grad)

    # Only here are blocks wrapped one by one on a CPU, hence freed between passes.
    yield _patch(swapped, "_add_grad", add)


@bug("llama", "pretrain", "pp2.interleavedzb.v2")
def a_weight_product_skipped() -> Iterator[Any]:
    real = native._PipelineWork.after_backward
    from shardwise.parallel import pipeline

    def weights(self: Any, chunk: int, microbatch: int) -> None:
        for product in self.later.pop((chunk, microbatch))[microbatch == 0 :]:
            product()
        real(self.work, chunk)

    yield _patch(pipeline.Executor, "_weights", weights)


@bug("gpt2", "pretrain", "pp2.1f1b")
def layers_numbered_from_each_stages_start() -> Iterator[Any]:
    """Dropout then draws the first layers' masks again."""
    from shardwise.models.common import decoder

    real = decoder.Decoder.hidden

    def hidden(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        kept = [b for b in self.layers if b is not None]
        whole = self.layers
        self.layers = torch.nn.ModuleList(kept)
        try:
            return real(self, *args, **kwargs)
        finally:
            self.layers = whole

    yield _patch(decoder.Decoder, "hidden", hidden)


# --- context parallel ---------------------------------------------------------------------------


@bug("llama", "pretrain", "cp2.ring")
def positions_counted_from_each_ranks_start() -> Iterator[Any]:
    real = inputs.Cut.arguments

    def arguments(self: Any, *args: Any) -> dict[str, Any]:
        found = real(self, *args)
        ids = found["input_ids_BT"]
        return found | {"position_ids_BT": torch.arange(ids.shape[1]).expand_as(ids)}

    yield _patch(inputs.Cut, "arguments", arguments)


@bug("llama", "sft", "cp2.ring")
def ring_without_rescaling() -> Iterator[Any]:
    def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        known = (lse > -torch.inf).to(out.dtype)[..., None]
        out.copy_(out * known * 0.5 + part * (1.0 - 0.5 * known))
        lse.copy_(torch.logaddexp(lse, part_lse))

    yield _patch(attention_blocks, "merge", merge)


@bug("llama", "sft", "cp2.ring")
def ring_gradient_by_each_blocks_own_softmax() -> Iterator[Any]:
    """What autograd through the merge gives: the forward pass is exact."""
    real = attention_blocks.backward

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Any, lse: Tensor, block: Any):  # type: ignore[no-untyped-def]
        own_out, own_lse = attention_blocks.forward(q, k, v, block)
        weight = torch.where(own_lse > -torch.inf, (own_lse - lse).exp(), 0.0)[..., None]
        return real(grad * weight, q, k, v, own_out, own_lse, block)

    yield _patch(attention_blocks, "backward", backward)


@bug("llama", "pretrain", "cp2.ring")
def ring_lets_packed_documents_leak() -> Iterator[Any]:
    yield _patch(context.ContextMask, "is_causal", True)


@bug("llama", "pretrain", "cp2.ulysses")
def ulysses_lets_packed_documents_leak() -> Iterator[Any]:
    real = context.plain.causal_mask

    def causal_mask(positions: Tensor, dtype: Any, segments: Any = None, window: Any = None) -> Any:
        return real(positions, dtype, None, window)

    yield _patch(context.plain, "causal_mask", causal_mask)


@bug("llama", "sft", "cp2.ring")
def gathered_logprobs_gradient_counted_by_every_rank() -> Iterator[Any]:
    real = context._GatherTokens.backward

    def backward(ctx: Any, grad: Tensor) -> Any:
        mine, *rest = real(ctx, grad)
        return mine * ctx.group.size(), *rest

    yield _patch(context._GatherTokens, "backward", staticmethod(backward))


# --- reinforcement ------------------------------------------------------------------------------


@bug("llama", "grpo", "dp2.zero2")
def reference_that_is_another_model() -> Iterator[Any]:
    real = native.assemble

    def other(
        config: Any, engine: Any, where: Any, seed: int, *others: Any, **options: Any
    ) -> assemble.Assembled:
        other.calls += 1  # type: ignore[attr-defined]
        again = seed + (other.calls == 2)  # type: ignore[attr-defined]
        return real(config, engine, where, again, *others, **options)

    other.calls = 0  # type: ignore[attr-defined]
    yield _patch(native, "assemble", other)


@bug("llama", "grpo", "tp2.sp")
def generator_with_stale_weights() -> Iterator[Any]:
    real = native.NativeEngine.__init__

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        stale = [(n, t.clone()) for n, t in native.NativeEngine.weights(self)]
        self.weights = lambda: iter(stale)

    yield _patch(native.NativeEngine, "__init__", start)
