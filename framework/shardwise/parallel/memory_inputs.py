"""A model and a layout in the plain numbers that `shardwise.memory` takes."""

from __future__ import annotations

from shardwise import memory
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel import pipeline, schedule_analysis
from shardwise.parallel.layout import Layout

_LAYOUT_NUMBERS = ("dp", "shard", "zero", "tp", "sp", "pp", "cp", "cp_kind")


def model_shape(model: DecoderConfig, adapted: memory.Adapted | None = None) -> memory.ModelShape:
    """The sizes of a decoder. A scalar head is tied to nothing and occupies nothing to speak of."""
    layer = model.spec.layer
    return memory.ModelShape(
        hidden_size=layer.hidden_size,
        num_layers=model.num_layers,
        num_heads=layer.num_heads,
        num_kv_heads=layer.kv_heads,
        head_width=layer.head_width,
        ffn_size=layer.ffn_size,
        vocab_size=max(1, model.vocab_size),
        tied=model.tie_embeddings or model.head == "scalar",
        adapted=adapted,
        gated=layer.gated,
        centred=layer.norm.kind == "layer",
        norms=layer.norms,
        parallel=layer.parallel,
        qk_norm=layer.qk_norm,
        soft_capped_scores=any(one.attn_soft_cap is not None for one in model.spec.layers),
        soft_capped_logits=model.spec.logit_soft_cap is not None,
    )


def place_of(
    model: DecoderConfig, layout: Layout, pipeline_rank: int, micro_batches: int
) -> memory.Place:
    """A rank of a layout: its pipeline stages and the micro-batches that they hold at once.

    They are counted in the program that the engine would run, for each pipeline stage at its own
    worst moment and at that of all together, and until all of its backward pass is done.
    """
    cuts = pipeline.split_model(model, layout.num_chunks)
    chunks = pipeline.chunks_of(layout, pipeline_rank)
    held, together, messages, last = {0: 1}, {0: 1}, 0, {0: 0}
    halves: set[tuple[int, ...]] = set()
    if layout.pp > 1:
        programs = _programs(layout, micro_batches)
        actions = programs.actions[pipeline_rank]
        size = {c: len(cut) for c, cut in enumerate(cuts)}
        held, together = schedule_analysis.in_flight(actions, size)
        halves = schedule_analysis.between_halves(actions, chunks)
        messages, last = programs.messages[pipeline_rank]
    parts = tuple(
        memory.Part(
            len(cuts[c]),
            0 in cuts[c],
            model.num_layers - 1 in cuts[c],
            held[c],
            together.get(c, 0),
            last[c],
        )
        for c in chunks
    )
    numbers = {n: getattr(layout, n) for n in _LAYOUT_NUMBERS}
    return memory.Place(parts, **numbers, messages=messages, halves=tuple(sorted(halves)))


def _programs(layout: Layout, micro_batches: int) -> schedule_analysis.Programs:
    """Where the schedule cannot do with so few (`parallel.feasible` says so), with the next more.

    Every schedule can do with any multiple of pp from twice that number on.
    """
    for number in range(micro_batches, micro_batches + 2 * layout.pp):
        try:
            return pipeline.program(layout, number)
        except ValueError:
            continue
    return pipeline.program(layout, micro_batches + 2 * layout.pp)
