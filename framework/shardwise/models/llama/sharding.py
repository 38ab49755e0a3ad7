"""How the Llama family is cut for tensor parallelism."""

from shardwise.models.common.sharding import ShardRule

SHARDING = (
    ShardRule("embed", "vocab"),
    ShardRule("layers.*.attn_norm", "sequence"),
    ShardRule("layers.*.attn.q", "column"),
    ShardRule("layers.*.attn.[kv]", "kv"),
    ShardRule("layers.*.attn.[qk]_norm", "per_head"),
    ShardRule("layers.*.attn.o", "row"),
    ShardRule("layers.*.mlp_norm", "sequence"),
    ShardRule("layers.*.mlp.gate", "column"),
    ShardRule("layers.*.mlp.up", "column"),
    ShardRule("layers.*.mlp.down", "row"),
    ShardRule("layers.*.drop", "tokens"),
    ShardRule("norm", "sequence"),
    ShardRule("head", "column"),
)
