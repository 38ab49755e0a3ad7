"""What a layout makes of a recipe's sizes, as named facts: which cases its code will meet.

Two recipes with equal facts under a layout take the same branches of it: what is cut, what is
padded, what is replicated, which ranks have less than others. `shrink` looks for a small recipe
that has the user's facts. Their names and values are what a user reads.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.config.schema import BatchConfig, Fp8Config
from shardwise.models.common.config import DecoderConfig
from shardwise.optim.schedules import global_batch_at
from shardwise.parallel.context import multiple_of, tokens_multiple
from shardwise.parallel.layout import Layout
from shardwise.parallel.pipeline import split_model

Facts = dict[str, Any]
TIMES = "micro-batches, times the number of pipeline stages"


def structure(
    model: DecoderConfig,
    batch: BatchConfig,
    layout: Layout,
    *,
    updates: int = 1,
    fp8: Fp8Config | None = None,
) -> Facts:
    """All facts of one layout of one recipe.

    ``updates``: into which a global batch is cut. The names differ between layouts only by what a
    layout does not have (its pipeline stages, say).
    """
    return (
        head_facts(model, layout)
        | width_facts(model, layout)
        | layer_facts(model, layout, fp8)
        | token_facts(model, batch.seq_len, layout)
        | batch_facts(batch, layout, updates)
    )


def few(number: int, most: int = 3) -> int | str:
    """The number itself while it is a case of its own: 0, 1, 2, "3 or more"."""
    return number if number < most else f"{most} or more"


def _several(number: int) -> int | str:
    return number if number < 2 else "several"


def head_facts(model: DecoderConfig, layout: Layout) -> Facts:
    """How attention's heads lie on ranks."""
    q, kv, tp = model.num_heads, model.kv_heads, layout.tp
    facts: Facts = {
        "query heads a KV head": few(q // kv),
        "query heads a rank": _shared(q, tp),
        "KV heads a rank": _shared(kv, tp),
    }
    if layout.cp > 1 and layout.cp_kind == "ulysses":
        facts["query heads a rank within attention"] = _shared(max(1, q // tp), layout.cp)
        facts["KV heads a rank within attention"] = _shared(max(1, kv // tp), layout.cp)
    return facts


def _shared(heads: int, ranks: int) -> int | str:
    """Some heads over some ranks, in words."""
    if heads % ranks == 0:
        return few(heads // ranks)
    if ranks % heads == 0:
        return f"1, on {ranks // heads} ranks"
    return f"{heads} over {ranks}"


def width_facts(model: DecoderConfig, layout: Layout) -> Facts:
    """What of the widths is left over when ranks share them out."""
    of_width = model.head_width * model.num_heads == model.hidden_size
    facts: Facts = {"heads make up the width": of_width}
    widths = {"vocabulary": model.vocab_size, "ffn width": model.ffn_width}
    for (what, width), (axis, ranks) in itertools.product(
        widths.items(), (("tp", layout.tp), ("ZeRO shards", layout.shard))
    ):
        if ranks > 1 and width:
            facts[f"{what} left over by {axis}"] = width % ranks
    if layout.tp > 1:  # as a head of one number shares it out
        facts["width left over by tp"] = model.hidden_size % layout.tp
    if layout.shard > 1:
        facts["width divides by ZeRO shards"] = model.hidden_size % layout.shard == 0
    return facts


def layer_facts(model: DecoderConfig, layout: Layout, fp8: Fp8Config | None = None) -> Facts:
    """How layers lie on pipeline stages, virtual ones counted."""
    layers = model.num_layers
    facts: Facts = {
        "layers": _several(layers),
        "layer numbers of two digits": layers > 10,
        "kinds of layers": ", then ".join(model.spec.kinds()),
    }
    if layout.pp > 1:
        parts = _parts(model, layout.num_chunks)
        facts["layers a pipeline stage"] = _several(layers // layout.num_chunks)
        facts["pipeline stages of unequal depth"] = len(set(parts)) > 1
        if len(model.spec.kinds()) > 1:
            facts["every pipeline stage has kinds of layers as the first has"] = _alike(
                [layer.kind for layer in model.spec.layers], parts
            )
    if fp8 is not None:
        facts["quantised layers"] = _several(max(0, layers - fp8.first_layers - fp8.last_layers))
    return facts


def still_facts(model: DecoderConfig, still: int, layout: Layout) -> Facts:
    """How many layers of each pipeline stage are trained, where the first ``still`` are not."""
    parts = _parts(model, layout.num_chunks)
    ends = list(itertools.accumulate(parts))
    learn = [max(0, min(n, end - still)) for n, end in zip(parts, ends, strict=True)]
    said = ["all" if k == n else few(k, 1) for k, n in zip(learn, parts, strict=True)]
    return {"trained layers of a pipeline stage": said}


def _alike(kinds: Sequence[str], parts: Sequence[int]) -> bool:
    """Whether a layer's number within its stage tells its kind."""
    starts = itertools.accumulate(parts, initial=0)
    return all(list(kinds[s : s + n]) == list(kinds[:n]) for s, n in zip(starts, parts))


@functools.lru_cache(maxsize=1024)
def _split(model: str, cls: type[DecoderConfig], parts: int) -> tuple[int, ...]:
    return tuple(map(len, split_model(cls.model_validate_json(model), parts)))


def _parts(model: DecoderConfig, parts: int) -> tuple[int, ...]:
    """Layers of each part of the model; none where there are more parts than layers."""
    if parts > model.num_layers:
        return ()
    return _split(model.model_dump_json(), type(model), parts)


def token_facts(model: DecoderConfig, seq_len: int, layout: Layout) -> Facts:
    """What of a whole row is left over when ranks share it out, and how far a window reaches."""
    facts: Facts = {}
    multiple = tokens_multiple(layout)
    if multiple > 1:
        facts[f"tokens left over by pieces of {multiple}"] = seq_len % multiple
    window = next((x.window for x in model.spec.layers if x.window is not None), None)
    if window is not None:
        pieces = multiple_of(layout.cp, layout.cp_kind) if layout.cp > 1 else 1
        padded = -(-seq_len // multiple) * multiple
        reach = "beyond a rank's tokens"
        if window <= padded // layout.cp:
            reach = "within a rank's tokens"
        if window <= padded // pieces:  # a ring's rank has two pieces of the row
            reach = "within a piece of a rank's tokens"
        facts["window"] = "the whole row" if window >= seq_len else reach
    return facts


def batch_facts(batch: BatchConfig, layout: Layout, updates: int = 1) -> Facts:
    """How the rows of an update are dealt to data ranks and cut into micro-batches."""
    facts = _row_facts(batch.global_batch // updates, batch.micro_batch, layout)
    facts["updates a global batch"] = updates
    facts["batch ramp"] = batch.ramp_start is not None
    if batch.ramp_start is not None:
        facts["batch ramp grows"] = batch.ramp_start < batch.global_batch
        met = [_row_facts(n, batch.micro_batch, layout) for n in _rows_met(batch)]
        for name in dict.fromkeys(itertools.chain(*met)):
            values = {_said(found.get(name)) for found in met}
            facts[f"{name}, over a ramp"] = " or ".join(sorted(values))
    return facts


def _rows_met(batch: BatchConfig) -> list[int]:
    """Rows of the updates of a ramp, and of the full batch behind it, each number once."""
    assert batch.ramp_start is not None
    steps = min(batch.ramp_steps, batch.global_batch - batch.ramp_start)  # more meet no others
    met = {batch.ramp_start, batch.global_batch}
    if steps > 0:
        ramp = batch.model_copy(update={"ramp_steps": steps})
        met |= {global_batch_at(ramp, step) for step in range(steps)}
    return sorted(met)


def prompt_facts(prompts: int, layout: Layout) -> Facts:
    """How the prompts of a rollout are dealt to all ranks."""
    world = layout.world
    return {
        "prompts a rank": _several(-(-prompts // world)),
        "ranks have unequal prompts": prompts % world != 0,
        "ranks without prompts": _several(max(0, world - prompts)),
    }


def _row_facts(rows: int, micro_batch: int, layout: Layout) -> Facts:
    share = -(-rows // layout.dp)
    number = -(-share // micro_batch)
    facts: Facts = {
        "rows a micro-batch": _several(min(micro_batch, share)),
        "micro-batches a rank": _several(number),
        "last micro-batch is short": number > 1 and share % micro_batch != 0,
    }
    if layout.dp > 1:
        facts["data ranks have unequal rows"] = rows % layout.dp != 0
        facts["data ranks without rows"] = _several(layout.dp - -(-rows // share))
    if layout.pp > 1:
        sign = (number > layout.pp) - (number < layout.pp)
        facts["micro-batches against pipeline ranks"] = ("as many", "more", "fewer")[sign]
        facts["micro-batches fill rounds of pipeline ranks"] = number % layout.pp == 0
        if layout.schedule == "gpipe":  # which holds all of them at once
            facts[TIMES] = few(-(-number // layout.num_chunks), 5)
    return facts


def lost(user: Mapping[str, Any], small: Mapping[str, Any]) -> list[str]:
    """Facts of a user's recipe that a small one has not, in words."""
    return [
        f"{name}: {_said(small.get(name))}, in the recipe {_said(value)}"
        for name, value in user.items()
        if small.get(name) != value
    ]


def _said(value: Any) -> str:
    return {"True": "yes", "False": "no", "None": "none"}.get(str(value), str(value))
