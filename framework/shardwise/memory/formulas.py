"""Bytes on one rank by category, each at its own peak within a training step.

Sources: ZeRO's table of states (Rajbhandari et al. 2020, figure 1 and section 5: fp32 masters and
two Adam moments cut by the data ranks, copies in the compute dtype gathered), with FSDP2's own
buffers as torch 2.13 allocates them, and `memory.activations`.
"""

from __future__ import annotations

import dataclasses

from shardwise.memory import activations, quantised
from shardwise.memory.optimizers import FUSED, fused_gradients, optimizer_states
from shardwise.memory.parameters import (
    Matrix,
    block_matrices,
    end_matrices,
    gathered,
    groups,
    held,
    learned,
    local,
    query_width,
    sharded,
    trained,
    used_kv_width,
)
from shardwise.memory.shapes import ModelShape, Part, Place, Work

LOSS_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 27}  # logits that the loss treats at once


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Bytes on one rank."""

    master_shards: int
    compute_copies: int
    gradients: int  # when the optimizer updates: shards
    peak_gradients: int  # before and while they are reduced
    optimizer_states: int
    activations: int
    buffers: int

    @property
    def at_update(self) -> int:
        """What lives while the optimizer updates."""
        return self.master_shards + self.gradients + self.optimizer_states


def occupancy(model: ModelShape, place: Place, work: Work, optimizer: str = "adamw") -> Occupancy:
    """All categories; ``optimizer``: one of `memory.optimizers.KINDS`."""
    fused = optimizer in FUSED
    return Occupancy(
        master_shards=master_shards(model, place, work),
        compute_copies=compute_copies(model, place, work),
        gradients=0 if fused else gradients(model, place, work),
        peak_gradients=fused_gradients(model, place, work)
        if fused
        else peak_gradients(model, place, work),
        optimizer_states=optimizer_states(model, place, work, optimizer),
        activations=activations.peak(model, place, work),
        buffers=buffers(model, place, work),
    )


def master_shards(model: ModelShape, place: Place, work: Work) -> int:
    """Parameters in full precision, and weights in few bits: this rank's part of each."""
    return work.master_bytes * held(model, place) + quantised.kept(model, place)


def gradients(model: ModelShape, place: Place, work: Work) -> int:
    """When the optimizer updates: as the masters, whatever the ZeRO stage (FSDP2 scatters)."""
    return work.master_bytes * trained(model, place)


def compute_copies(model: ModelShape, place: Place, work: Work) -> int:
    """Weights in the compute dtype while the model computes.

    A rank whose weights are nobody else's needs none where it computes in the masters' dtype.
    ZeRO-3 holds the ends and one block at a time (the next one waits in a buffer), the other stages
    everything.
    """
    if place.alone and work.compute_bytes == work.master_bytes:
        return 0
    n = place.holders
    total = 0
    for part in place.parts:
        sizes = [gathered(g, n) for g in groups(model, place, work, part)]
        total += (
            max(sizes[:-1], default=0) + sizes[-1]
            if place.zero == 3 and not place.alone
            else sum(sizes)
        )
    return work.compute_bytes * total


def peak_gradients(model: ModelShape, place: Place, work: Work) -> int:
    """Gradients before and while they are reduced.

    A rank alone turns each into the masters' dtype as it arrives: the embedding's last, and with
    several micro-batches all beside those of earlier ones. Of an embedding that is neither split
    nor tied there, only the rows of a micro-batch's tokens arrive. ZeRO-0 and -1 with several
    micro-batches sum whole gradients in the masters' dtype. Otherwise those of one group wait
    whole, in the compute dtype, beside the shards of what was reduced before.
    """
    c, m, n = work.compute_bytes, work.master_bytes, place.holders
    again = work.micro_batches > 1
    if place.alone and model.adapted is not None:
        largest = max(x.elements for x in learned(block_matrices(model, place)))
        return m * trained(model, place) + (c * largest if c != m else 0)
    if place.alone:
        first = place.parts[0]
        rows_only = first.first and place.tp == 1 and not (first.last and model.tied)
        ends = end_matrices(model, place, first)[rows_only:]
        arriving = [] if rows_only else ends[:1]
        if again:
            others = [end_matrices(model, place, part) for part in place.parts[1:]]
            every = [*block_matrices(model, place), *ends, *(x for end in others for x in end)]
            arriving = [max(every, key=lambda x: x.elements)]
        return m * held(model, place) + (c * local(arriving) if c != m else 0)
    by_part = [
        [learned(group) for group in groups(model, place, work, part)] for part in place.parts
    ]
    whole = [sum(local(g) for g in of_part) for of_part in by_part]
    if place.zero < 2 and again:
        return m * sum(whole) + (c * max(whole) if c != m else 0)
    peak = 0
    before = held(model, place) if model.adapted is None else trained(model, place)
    reduced = before if again or len(by_part) > 1 else 0
    for of_part in by_part:
        done = 0
        for group in of_part:
            peak = max(peak, m * max(done, reduced) + c * local(group))
            done += sharded(group, n)
    return max(peak, gradients(model, place, work))


def buffers(model: ModelShape, place: Place, work: Work) -> int:
    """Logits, messages, workspace: the largest of five moments, and what a pipeline has in transit.

    Gradients are reduced in the last backward pass, by when little is in transit; from ZeRO-2 on,
    in each. Kernels' own workspace is not seen.
    """
    moving = transit(model, place, work)
    waiting = deferred_buffers(model, place, work)

    def of_part(part: Part) -> int:
        settled = part.last_messages * activations.boundary(model, place, work)
        by_batch = place.zero > 1 and work.micro_batches > 1
        return max(
            moving + loss_buffers(model, place, work, part),
            moving + waiting + backward_buffers(model, place, work, part),
            moving + waiting + end_buffers(model, place, work, part),
            moving + gather_buffers(model, place, work, part),
            (moving if by_batch else settled) + reduce_buffers(model, place, work, part),
        )

    return max(map(of_part, place.parts))


def loss_buffers(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """Logits in flight, a gradient of theirs, and a chunk widened (see `ops.cross_entropy`).

    The kernel for CPU needs no chunk, but knows no fp64.
    """
    if not part.last:
        return 0
    words = -(-model.vocab_size // place.tp)
    held = (part.in_flight + 1) * activations.logits(model, place, work)
    if work.device == "cpu" and work.wide_bytes == 4:
        return held
    rows = min(activations.tokens(place, work), LOSS_CHUNK[work.device] // words)
    return held + work.wide_bytes * max(1, rows) * words


def backward_buffers(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """The widest moment of a block's backward pass, and what waits beside it.

    It is an RMS norm's (five tensors in fp32 at least), the feed-forward's (three), or that of
    attention with a soft cap, for which no kernel serves: five tensors of all scores, or four of
    them beside the gradients.
    """
    norm = 5 * work.wide_bytes * activations.stream_tokens(place, work) * model.hidden_size
    tokens, c = activations.tokens(place, work), work.compute_bytes
    width = c * tokens * -(-model.ffn_size // place.tp)
    ffn = 3 * width
    if (
        not place.splits_backward
    ):  # beside the gradients of gate and up: what they read, and one's weight
        arriving = added(place, work, block_matrices(model, place))
        ffn = max(ffn, 2 * width + c * tokens * model.hidden_size + arriving) if arriving else ffn
    scores = 0
    if model.soft_capped_scores:
        pairs = tokens * -(-work.seq_len // place.cp) * model.num_heads // place.tp
        q, kv = (tokens * f(model, place) for f in (query_width, used_kv_width))
        capped = 5 * work.wide_bytes * pairs + 4 * c * q
        ended = (3 * work.wide_bytes + c) * pairs + c * (6 * q + 2 * kv)
        scores = max(capped, ended)
    made = quantised.in_full(model, place, work)
    return max(norm, ffn, scores) + made + _waiting(model, place, work, part)


def end_buffers(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """Where the gradient of an embedding or a head is added to those of earlier micro-batches.

    A head's arrives beside the logits' and that of its input.
    """
    stream = activations.boundary(model, place, work)
    ends = end_matrices(model, place, part)
    total = 0
    if part.first:
        arriving = added(place, work, ends[:1])
        tied = model.tied and part.last and not (place.alone and place.tp > 1)
        total = arriving * (2 if tied else 1) + stream
    if part.last:
        head = added(place, work, ends)
        if not place.splits_backward:  # else the logits' waits, see `deferred_buffers`
            head += activations.logits(model, place, work) + _summed(model, place, work)
        total = max(total, head)
    return total


def _summed(model: ModelShape, place: Place, work: Work) -> int:
    """A head's input's gradient; several ranks sum it from a copy, or scatter it from one."""
    whole = work.compute_bytes * activations.tokens(place, work) * model.hidden_size
    if place.tp == 1:
        return whole
    copies = (2 if work.device == "cpu" else 1) if place.sp else 0
    return whole * (1 + copies) + activations.boundary(model, place, work)


def added(place: Place, work: Work, matrices: list[Matrix]) -> int:
    """The largest gradient that is made to be added to another: of an earlier micro-batch.

    Where it is added in another dtype, it counts as a gradient (`peak_gradients`); where shards are
    reduced at once, it is the only one.
    """
    again = work.micro_batches > 1 and (place.alone or place.zero < 2)
    if not again or work.compute_bytes != work.master_bytes:
        return 0
    return work.master_bytes * max((m.elements for m in learned(matrices)), default=0)


def _waiting(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """During a block's backward pass: the gradient that entered it, a tied head's (it waits for
    the embedding's, but not where tensor parallelism leaves its product for later), and under
    ZeRO-3 the weights of the next block.
    """
    total = activations.boundary(model, place, work)
    own = model.adapted is None and not (place.alone and place.tp > 1)
    if part.first and part.last and model.tied and own:
        total += work.compute_bytes * local(end_matrices(model, place, part)[:1])
    if place.zero == 3 and part.layers > 1 and place.holders > 1:
        total += work.compute_bytes * gathered(groups(model, place, work, part)[0], place.holders)
    return total


def gather_buffers(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """An all-gather's result and its rounded input; on CPU, the input once for every rank.

    FSDP2 keeps the result of the last one until the forward pass ends, beside the logits.
    """
    n, c = place.holders, work.compute_bytes
    if n == 1:
        return 0
    found = groups(model, place, work, part)
    largest = max(found, key=local)
    result = c * gathered(largest, n)
    moving = result * (2 if work.device == "cpu" else 1)
    moving += c * sharded(largest, n) if c != work.master_bytes else 0
    last = found[-2:][0]  # the last block, or everything
    waiting = activations.logits(model, place, work) if part.last else 0
    return max(moving, c * gathered(last, n) + waiting)


def reduce_buffers(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """A reduce-scatter's input in the masters' dtype; on CPU, also what the others sent.

    A shard group of one rank has a copy in place of that. Where shards exist already, from an
    earlier micro-batch, the result waits to be added.
    """
    if place.alone:
        return 0
    m, n = work.master_bytes, place.holders
    copies = 2 if work.device == "cpu" or n == 1 else 1
    added = place.zero > 1 and work.micro_batches > 1

    def reduced(group: list[Matrix]) -> int:
        return m * (copies * gathered(group, n) + (sharded(group, n) if added else 0))

    *blocks, ends = (learned(group) for group in groups(model, place, work, part))
    if not blocks:
        return reduced(ends)
    return max(reduced(blocks[0]) + _waiting(model, place, work, part), reduced(ends))


def deferred_buffers(model: ModelShape, place: Place, work: Work) -> int:
    """Gradients of products' results that wait for the weights' half of a backward pass."""
    q, kv = query_width(model, place), used_kv_width(model, place)
    block = q + 2 * kv + 2 * model.hidden_size + 2 * -(-model.ffn_size // place.tp)
    of_layer = work.compute_bytes * activations.tokens(place, work) * block
    of_part = [
        p.layers * of_layer + (activations.logits(model, place, work) if p.last else 0)
        for p in place.parts
    ]
    cases = (sum(n * size for n, size in zip(c, of_part, strict=True)) for c in place.halves)
    return max(cases, default=0)


def transit(model: ModelShape, place: Place, work: Work) -> int:
    """A pipeline rank's messages to and from its neighbours."""
    return place.messages * activations.boundary(model, place, work)
