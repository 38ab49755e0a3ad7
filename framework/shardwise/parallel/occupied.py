"""A model and a layout in the plain numbers that `shardwise.memory` takes."""

from __future__ import annotations

from shardwise import memory
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel import pipeline
from shardwise.parallel.layout import Layout

_LAYOUT_NUMBERS = ("dp", "shard", "zero", "tp", "sp", "pp", "cp", "cp_kind")


def model_shape(model: DecoderConfig) -> memory.ModelShape:
    """The sizes of a decoder. A scalar head is tied to nothing and occupies nothing to speak of."""
    return memory.ModelShape(
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.kv_heads,
        head_width=model.head_width,
        ffn_size=getattr(model, "ffn_width", None) or model.ffn_size,  # type: ignore[attr-defined]
        vocab_size=max(1, model.vocab_size),
        tied=model.tie_embeddings or model.head == "scalar",
    )


def place_of(
    model: DecoderConfig, layout: Layout, pipeline_rank: int, micro_batches: int
) -> memory.Place:
    """A rank of a layout: its pipeline stages and the micro-batches that they hold at once.

    The schedules that split the backward pass are taken as 1F1B.
    """
    cuts = pipeline.split_model(model, layout.num_chunks)
    held = 1
    if layout.pp > 1:
        kind = "gpipe" if layout.schedule == "gpipe" else "1f1b"
        held = memory.in_flight(kind, layout.pp, pipeline_rank, micro_batches)  # type: ignore[arg-type]
    parts = tuple(
        memory.Part(len(cuts[c]), 0 in cuts[c], model.num_layers - 1 in cuts[c], held)
        for c in pipeline.chunks_of(layout, pipeline_rank)
    )
    return memory.Place(parts, **{n: getattr(layout, n) for n in _LAYOUT_NUMBERS})
