"""Generation with a KV cache and continuous batching, and weight sync."""
