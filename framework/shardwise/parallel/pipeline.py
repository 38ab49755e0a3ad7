"""Pipeline parallelism: where the model is cut, in which order a rank works, and the doing of it.

Orders come from `torch.distributed.pipelining`'s schedules, communication included; the work is
done here, so that micro-batches may differ in length, what a part computes is the engine's
business, and the weight half of a split backward pass is an ordered list (`ops.linear.deferred`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import schedules as torch_schedules

from shardwise.models.common.config import DecoderConfig
from shardwise.ops import comm
from shardwise.ops.linear import deferred
from shardwise.parallel.layout import SINGLE, V_SHAPED, Layout
from shardwise.parallel.schedule_analysis import Message, Programs

AXIS = "pp"
_CLASSES: dict[str, Any] = {
    "interleaved": torch_schedules.ScheduleInterleaved1F1B,
    "interleavedzb": torch_schedules.ScheduleInterleavedZeroBubble,
    "zbv": torch_schedules.ScheduleZBVZeroBubble,
    "dualpipev": torch_schedules.ScheduleDualPipeV,
}


# --- where the model is cut ---------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def split_layers(costs: tuple[float, ...], first: float, last: float, parts: int) -> list[range]:
    """Consecutive layers for each part, each at least one, so that the dearest part is cheapest.

    ``costs`` are the layers', ``first`` what the first part has in front of them, ``last`` what
    the last has behind them. Of equally good cuts, the one with the least sum of squares.
    """
    num_layers = len(costs)
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)

    def price(part: int, start: int, stop: int) -> float:
        ends = first * (part == 0) + last * (part == parts - 1)
        return prefix[stop] - prefix[start] + ends

    @functools.cache
    def best(part: int, start: int) -> tuple[float, float, tuple[int, ...]]:
        if part == parts - 1:
            cost = price(part, start, num_layers)
            return cost, cost * cost, (num_layers,)
        options = []
        for stop in range(start + 1, num_layers - (parts - 2 - part)):
            cost = price(part, start, stop)
            worst, squares, stops = best(part + 1, stop)
            options.append((max(cost, worst), squares + cost * cost, (stop, *stops)))
        return min(options)

    stops = best(0, 0)[2]
    return [range(a, b) for a, b in zip((0, *stops), stops)]


def split_model(config: DecoderConfig, parts: int) -> list[range]:
    """The layers of every part of a model, balanced by FLOPs a token.

    The head counts with its product. The embedding's gradient is a table that is zeroed and added
    to once a micro-batch: two operations an element, shared by a sequence's tokens.
    """
    spec = config.spec
    width = spec.layer.num_heads * spec.layer.head_width
    table = float(spec.vocab_size * spec.hidden_size)
    head = 6.0 * spec.head_size * spec.hidden_size
    # Causal attention, forward and backward, as if it saw all: kinds of layers are cut evenly.
    seen = 6.0 * config.max_seq_len * width
    of_layer = {layer: 6.0 * layer.num_parameters + seen for layer in set(spec.layers)}
    costs = tuple(of_layer[layer] for layer in spec.layers)
    return split_layers(costs, 2.0 * table / config.max_seq_len, head, parts)


def chunks_of(layout: Layout, pp_rank: int) -> list[int]:
    """The parts of the model that a pipeline rank holds: in a loop, or in a V."""
    if layout.schedule in V_SHAPED and layout.pp > 1:
        return [pp_rank, 2 * layout.pp - 1 - pp_rank]
    return [pp_rank + i * layout.pp for i in range(layout.virtual)]


def homes(layout: Layout) -> dict[int, int]:
    """The pipeline rank that holds each part."""
    return {c: r for r in range(layout.pp) for c in chunks_of(layout, r)}


# --- in which order a rank works ----------------------------------------------------------------


def program(layout: Layout, num_microbatches: int) -> Programs:
    """For each pipeline rank, its actions of a training step, sends and receives included.

    Raises ValueError where torch's schedule cannot do with this number of micro-batches
    (`parallel.feasible` says so before).
    """
    return _program(_pipeline_of(layout), num_microbatches)


def forward_program(layout: Layout, num_microbatches: int) -> Programs:
    """The same without a backward pass, for any number of micro-batches."""
    return _forward_program(_pipeline_of(layout), num_microbatches)


def _pipeline_of(layout: Layout) -> Layout:
    return Layout(pp=layout.pp, virtual=layout.virtual, schedule=layout.schedule)


@functools.lru_cache(maxsize=64)
def _program(layout: Layout, num_microbatches: int) -> Programs:
    ranks = range(layout.pp)
    return _with_messages(layout, [_compute_order(layout, r, num_microbatches) for r in ranks])


@functools.lru_cache(maxsize=64)
def _forward_program(layout: Layout, num_microbatches: int) -> Programs:
    forward = torch_schedules._ComputationType.FORWARD
    orders = [
        [
            torch_schedules._Action(chunk, forward, m)
            for m in range(num_microbatches)
            for chunk in sorted(chunks_of(layout, rank))
        ]
        for rank in range(layout.pp)
    ]
    return _with_messages(layout, orders)


def _with_messages(layout: Layout, orders: Sequence[list[Any]]) -> Programs:
    home = homes(layout)
    complete: dict[int, list[Any]] = torch_schedules._add_send_recv(
        dict(enumerate(orders)), lambda chunk: home[chunk], layout.num_chunks
    )
    return Programs(
        [
            [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in complete[rank]]
            for rank in range(layout.pp)
        ]
    )


def _compute_order(layout: Layout, rank: int, num_microbatches: int) -> list[Any]:
    """One rank's forward and backward actions; idle slots left out."""
    if layout.schedule in SINGLE:
        # Written out: torch 2.13 runs these two without a table, and the table that it prints for
        # 1F1B starts the last rank at micro-batch 1.
        ahead = layout.pp - 1 - rank if layout.schedule == "1f1b" else num_microbatches
        ahead = min(ahead, num_microbatches)
        order = [("F", m) for m in range(ahead)]
        for m in range(num_microbatches):
            order += [("F", ahead + m)] if ahead + m < num_microbatches else []
            order += [("B", m)]
        kinds = torch_schedules._ComputationType
        return [torch_schedules._Action(rank, kinds(kind), m) for kind, m in order]
    parts = [
        SimpleNamespace(
            stage_index=c,
            num_stages=layout.num_chunks,
            group_size=layout.pp,
            group_rank=rank,
            group=None,
            device=torch.device("cpu"),
            is_first=c == 0,
            is_last=c == layout.num_chunks - 1,
            has_backward=True,
            stage_index_to_group_rank={},
            submod=torch.nn.Identity(),
        )
        for c in chunks_of(layout, rank)
    ]
    schedule = _CLASSES[layout.schedule](
        parts, n_microbatches=num_microbatches, loss_fn=lambda *_: None, scale_grads=False
    )
    actions: list[Any] = []
    for action in filter(None, schedule.pipeline_order[rank]):
        actions += list(action.sub_actions) if action.sub_actions else [action]
    return actions


# --- the doing of it ----------------------------------------------------------------------------


class Work:
    """What the executor asks of the engine, for chunk numbers and micro-batch numbers."""

    def forward(self, chunk: int, microbatch: int, x: Tensor | None) -> Tensor:
        """Activations after the chunk, or the scalar to differentiate after the last one.

        Without gradient, what the last one returns is not kept.
        """
        raise NotImplementedError

    def boundary(self, microbatch: int) -> Tensor:
        """Uninitialised memory for the activations between two chunks."""
        raise NotImplementedError

    def after_backward(self, chunk: int) -> None:
        """Gradients of weights have been added."""
        raise NotImplementedError


class Executor:
    """Runs one rank's actions for one step, or for one pass without gradient.

    What nobody needs any more is dropped as it goes; without gradient, that is all that has been
    handed on.
    """

    def __init__(self, layout: Layout, group: dist.ProcessGroup, work: Work) -> None:
        self.layout, self.group, self.work = layout, group, work
        self.home = homes(layout)
        self.last = layout.num_chunks - 1
        self.arriving: dict[tuple[str, int, int], comm.Pending] = {}
        self.inputs: dict[tuple[int, int], Tensor] = {}
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.grads: dict[tuple[int, int], Tensor] = {}  # of a chunk's output
        self.later: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.sent: dict[Message, comm.Pending] = {}

    def run(self, programs: Programs) -> None:
        """This rank's actions of all ranks' programs; returns when every message has left."""
        rank = self.group.rank()
        do = {
            "F": self._forward,
            "B": lambda c, m: self._backward(c, m, split=False),
            "I": lambda c, m: self._backward(c, m, split=True),
            "W": self._weights,
            "SEND_F": lambda c, m: self._send("SEND_F", c, m, self._output(c, m), c + 1),
            "RECV_F": lambda c, m: self._receive("F", c, m, c - 1),
            "SEND_B": lambda c, m: self._send("SEND_B", c, m, self._grad_of_input(c, m), c - 1),
            "RECV_B": lambda c, m: self._receive("B", c, m, c + 1),
        }
        release = programs.releases[rank]
        for i, (kind, chunk, microbatch) in enumerate(programs.actions[rank]):
            for message in release.get(i, ()):
                self.sent.pop(message).wait()
            do[kind](chunk, microbatch)
        for pending in self.sent.values():
            pending.wait()
        self.sent.clear()

    def _send(self, kind: str, chunk: int, microbatch: int, tensor: Tensor, to: int) -> None:
        pending = comm.send(tensor, self.home[to], self.group, AXIS)
        self.sent[kind, chunk, microbatch] = pending

    def _output(self, chunk: int, microbatch: int) -> Tensor:
        """Activations for the next chunk; kept for the backward pass, if there will be one."""
        key = (chunk, microbatch)
        kept = torch.is_grad_enabled()
        return self.outputs[key].detach() if kept else self.outputs.pop(key)

    def _receive(self, kind: str, chunk: int, microbatch: int, source: int) -> None:
        memory = self.work.boundary(microbatch)
        pending = comm.receive(memory, self.home[source], self.group)
        self.arriving[kind, chunk, microbatch] = pending

    def _forward(self, chunk: int, microbatch: int) -> None:
        key, training = (chunk, microbatch), torch.is_grad_enabled()
        x = None
        if chunk > 0:
            if self.home[chunk - 1] == self.home[chunk]:
                x = self._output(chunk - 1, microbatch)
            else:
                x = self.arriving.pop(("F", *key)).wait()
            if training:
                self.inputs[key] = x.requires_grad_()
        output = self.work.forward(chunk, microbatch, x)
        if training or chunk < self.last:
            self.outputs[key] = output

    def _backward(self, chunk: int, microbatch: int, *, split: bool) -> None:
        key = (chunk, microbatch)
        grad = None
        if chunk < self.last:
            if self.home[chunk + 1] == self.home[chunk]:
                grad = self._grad_of_input(chunk + 1, microbatch)
            else:
                grad = self.arriving.pop(("B", *key)).wait()
        output = self.outputs.pop(key)
        if split:
            with deferred() as self.later[key]:
                torch.autograd.backward(output, grad)
        else:
            torch.autograd.backward(output, grad)
            self.work.after_backward(chunk)

    def _grad_of_input(self, chunk: int, microbatch: int) -> Tensor:
        grad = self.inputs.pop((chunk, microbatch)).grad
        assert grad is not None
        return grad

    def _weights(self, chunk: int, microbatch: int) -> None:
        for product in self.later.pop((chunk, microbatch)):
            product()
        self.work.after_backward(chunk)
