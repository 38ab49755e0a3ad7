"""How GPT-2 is cut for tensor parallelism."""

from shardwise.models.common.sharding import ShardRule

SHARDING = (
    ShardRule("embed", "vocab"),
    ShardRule("pos_embed", "replicate"),
    ShardRule("layers.*.attn_norm", "sequence"),
    ShardRule("layers.*.attn.[qkv]", "column"),
    ShardRule("layers.*.attn.o", "row"),
    ShardRule("layers.*.mlp_norm", "sequence"),
    ShardRule("layers.*.mlp.up", "column"),
    ShardRule("layers.*.mlp.down", "row"),
    ShardRule("norm", "sequence"),
    ShardRule("head", "column"),
)
