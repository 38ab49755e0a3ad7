"""Generation with a KV cache and continuous batching, and weight sync."""

from shardwise.rollout.generator import Generator
from shardwise.rollout.sampling import Sampling
from shardwise.rollout.scheduler import Completion, Request
from shardwise.rollout.weights import stream_checksum, weights_checksum

__all__ = [
    "Completion",
    "Generator",
    "Request",
    "Sampling",
    "stream_checksum",
    "weights_checksum",
]
