"""How GPT-2 is cut for tensor parallelism."""

from shardwise.models.common.sharding import ShardRule

SHARDING = (
    ShardRule("embed", "vocab"),
    ShardRule("pos_embed", "tokens"),
    ShardRule("embed_drop", "tokens"),
    ShardRule("layers.*.attn_norm", "sequence"),
    ShardRule("layers.*.attn.q", "column"),
    ShardRule("layers.*.attn.[kv]", "kv"),
    ShardRule("layers.*.attn.o", "row"),
    ShardRule("layers.*.mlp_norm", "sequence"),
    ShardRule("layers.*.mlp.up", "column"),
    ShardRule("layers.*.mlp.down", "row"),
    ShardRule("layers.*.drop", "tokens"),
    ShardRule("norm", "sequence"),
    ShardRule("head", "column"),
)
