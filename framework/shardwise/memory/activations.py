"""What autograd keeps of one micro-batch between its forward and its backward pass, in bytes.

After Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
section 4 and table 2), redone for this code: no dropout masks and no s^2 terms (fused attention
keeps a log-sum-exp instead), grouped key/value heads, SwiGLU, RMS norms that keep their fp32 input
and result, and sequence parallelism that keeps gathered inputs of products (Megatron gathers them
again), so only what the norms keep is divided by tp.

Written for eager blocks; a compiler chooses for itself what it keeps.
"""

from __future__ import annotations

import math

from shardwise.memory.parameters import query_width, used_kv_width
from shardwise.memory.shapes import ModelShape, Part, Place, Work


def tokens(place: Place, work: Work) -> int:
    """Tokens of a micro-batch on one rank, in the products."""
    return work.micro_batch * -(-work.seq_len // place.cp)


def stream_tokens(place: Place, work: Work) -> int:
    """Tokens of a micro-batch on one rank, in norms and residuals (sequence parallelism cuts)."""
    return -(-tokens(place, work) // (place.tp if place.sp else 1))


def boundary(model: ModelShape, place: Place, work: Work) -> int:
    """Activations of a micro-batch between two blocks."""
    return work.compute_bytes * stream_tokens(place, work) * model.hidden_size


def _norm(model: ModelShape, place: Place, work: Work) -> int:
    """An RMS norm: input and normalised input in fp32 at least, and 1 / rms of each token.

    A layer norm: its input as it comes, mean and 1 / deviation.
    """
    if model.centred:
        n = stream_tokens(place, work)
        return n * (work.compute_bytes * model.hidden_size + 2 * work.wide_bytes)
    return work.wide_bytes * stream_tokens(place, work) * (2 * model.hidden_size + 1)


def _qk_norms(model: ModelShape, place: Place, work: Work) -> int:
    """The same of queries and keys, over each head or over all of them."""
    if model.qk_norm is None:
        return 0
    width = query_width(model, place) + used_kv_width(model, place)
    sums = width // model.head_width if model.qk_norm == "head" else 2
    return work.wide_bytes * tokens(place, work) * (2 * width + sums)


def _attention(model: ModelShape, place: Place, work: Work) -> int:
    """Rotated queries and keys, values, log-sum-exp, and the result.

    PyTorch's kernels and the ring put the heads in front of the result; the product behind it then
    keeps a copy with the tokens in front, where our kernel for CPU leaves them.
    """
    n, q = tokens(place, work), query_width(model, place)
    kv = used_kv_width(model, place)
    if place.cp > 1 and place.cp_kind == "ulysses":  # heads that the ranks do not divide
        kv *= math.lcm(model.num_kv_heads, place.cp) // model.num_kv_heads
    ring = place.cp > 1 and place.cp_kind == "ring"
    ours = work.device == "cpu" and work.compute_bytes < 8 and model.head_width % 16 == 0
    ours = ours and not model.soft_capped_scores  # no kernel knows a cap
    results = 1 if ours and not ring else 2
    lse = work.wide_bytes * q // model.head_width
    return n * (work.compute_bytes * (q + 2 * kv + results * q) + lse)


def block(model: ModelShape, place: Place, work: Work) -> int:
    """A block without recompute: norms, 2 inputs of products, attention, feed-forward.

    Of the latter: gate, silu(gate), up, and their product; without a gate, what goes into its
    activation, and comes out.
    """
    n, c = tokens(place, work), work.compute_bytes
    inputs = (1 if model.norms == "shared" else 2) * n * c * model.hidden_size
    ffn = (4 if model.gated else 2) * n * c * -(-model.ffn_size // place.tp)
    if (adapted := model.adapted) is not None:
        ffn += n * c * adapted.rank * len(adapted.layers)  # what A gives B
        # Of a network between two products: what is given to the first, before and behind its
        # activation; one beside the MLP is given what the MLP keeps already.
        seen, between = stream_tokens(place, work), adapted.bottleneck
        if adapted.cut:
            seen, between = n, -(-between // place.tp)
        kept = 2 * between + (0 if adapted.cut else model.hidden_size)
        ffn += seen * c * kept * adapted.per_block
    norms = model.norms_per_block * _norm(model, place, work) + _qk_norms(model, place, work)
    if model.parallel and model.centred and model.norms_per_block == 2:
        norms -= boundary(model, place, work)  # both keep the same input
    return norms + inputs + _attention(model, place, work) + ffn


def kept_block(model: ModelShape, place: Place, work: Work) -> int:
    """What stays of a block until its backward pass begins, with ``work.recompute``.

    ``full``: its input. ``selective``: its input, and the results of products and attention.
    """
    if work.recompute == "none":
        return block(model, place, work)
    kept = boundary(model, place, work)
    if work.recompute == "full":
        return kept
    n, c, d = tokens(place, work), work.compute_bytes, model.hidden_size
    q, f = query_width(model, place), -(-model.ffn_size // place.tp)
    kv = used_kv_width(model, place)
    results = c * (2 * q + 2 * kv + 2 * d + 2 * f)
    return kept + n * (results + work.wide_bytes * q // model.head_width)


def logits(model: ModelShape, place: Place, work: Work) -> int:
    """This rank's words of the logits of one micro-batch.

    Of all its tokens: at most so much where a loss reads those under its mask alone.
    """
    words = -(-model.vocab_size // place.tp)
    size = work.wide_bytes if work.wide_logits else work.compute_bytes
    return size * tokens(place, work) * words


def ends(model: ModelShape, place: Place, work: Work, part: Part) -> int:
    """Outside of the blocks: rotary tables (fp32 at least), the last norm, the head's input."""
    n = tokens(place, work)
    total = n * work.wide_bytes * model.head_width
    if part.last:
        total += _norm(model, place, work) + n * work.compute_bytes * model.hidden_size
        total += logits(model, place, work) if model.soft_capped_logits else 0  # their tanh
    if not part.first and (work.compute_bytes == work.wide_bytes or model.norms == "after"):
        # What the stage received is what its first norm or product keeps: it counts as in transit.
        total -= boundary(model, place, work)
    return total


def kept(model: ModelShape, place: Place, work: Work) -> int:
    """All that waits for its backward pass at once, of all micro-batches in flight."""
    of_block = kept_block(model, place, work)
    return sum(
        p.together * (p.layers * of_block + ends(model, place, work, p)) for p in place.parts
    )


def peak(model: ModelShape, place: Place, work: Work) -> int:
    """`kept`, and with recompute one block that is being computed again."""
    again = block(model, place, work) if work.recompute != "none" else 0
    return kept(model, place, work) + again
