"""How a dense decoder is cut for tensor parallelism."""

from __future__ import annotations

from shardwise.models.common.sharding import ShardRule
from shardwise.models.common.spec import ModelSpec


def sharding(spec: ModelSpec) -> tuple[ShardRule, ...]:
    """The rows of a spec."""
    layer = spec.layer
    positions = (ShardRule("pos_embed", "tokens"), ShardRule("embed_drop", "tokens"))
    norms: tuple[ShardRule, ...] = ()
    if layer.qk_norm == "head":
        norms = (ShardRule("layers.*.attn.[qk]_norm", "per_head"),)
    if layer.qk_norm == "projection":
        norms = (
            ShardRule("layers.*.attn.q_norm", "heads"),
            ShardRule("layers.*.attn.k_norm", "kv_heads"),
        )
    sinks = (ShardRule("layers.*.attn.sinks", "heads"),)
    behind = (
        ShardRule("layers.*.attn_post_norm", "own_tokens"),
        ShardRule("layers.*.mlp_post_norm", "own_tokens"),
    )
    return (
        ShardRule("embed", "vocab"),
        *(() if spec.learned_positions is None else positions),
        ShardRule("layers.*.attn_norm", "sequence"),
        ShardRule("layers.*.attn.q", "column"),
        ShardRule("layers.*.attn.[kv]", "kv"),
        *norms,
        *(sinks if layer.sinks else ()),
        ShardRule("layers.*.attn.o", "row"),
        *(() if layer.norms == "shared" else (ShardRule("layers.*.mlp_norm", "sequence"),)),
        *((ShardRule("layers.*.mlp.gate", "column"),) if layer.gated else ()),
        ShardRule("layers.*.mlp.up", "column"),
        ShardRule("layers.*.mlp.down", "row"),
        *(behind if layer.norms in ("around", "after") else ()),
        ShardRule("layers.*.drop", "tokens"),
        ShardRule("norm", "sequence"),
        ShardRule("head", "column"),
    )
