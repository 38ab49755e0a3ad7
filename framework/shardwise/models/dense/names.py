"""Names of tensors in transformers' checkpoints: a table a family, and the rules that it means.

No torch here: the tables stand beside the configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

Modules = str | tuple[str, ...]  # ours; several in one of theirs

# Ours in a layer against theirs.
LAYER: dict[Modules, str] = {
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
ENDS = {"embed": "model.embed_tokens", "norm": "model.norm"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
    """Modules of a family's checkpoints."""

    layer: Mapping[Modules, str] = dataclasses.field(default_factory=lambda: LAYER)
    ends: Mapping[str, str] = dataclasses.field(default_factory=lambda: ENDS)
    layers: str = "model.layers."
    prefix: str = "model."  # may be absent from all names, as in checkpoints of the bare decoder
    ignore: tuple[str, ...] = (".rotary_emb.inv_freq",)  # endings of what holds no weights of ours
    transposed: frozenset[str] = frozenset()  # theirs, whose weights are (in, out)
    head: str = "lm_head.weight"  # of a vocabulary, if it is not tied
    by_head: frozenset[str] = frozenset()  # theirs, in which ours stand in turn, head by head
    bare: frozenset[str] = frozenset()  # theirs, whose weight has the module's own name
