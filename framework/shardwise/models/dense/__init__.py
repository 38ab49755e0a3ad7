"""Dense decoders: one model, and a table a family; see `shardwise.models` for adding one."""
