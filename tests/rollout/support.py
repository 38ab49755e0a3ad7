"""Small models that both backends can serve, and requests for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from shardwise.config.schema import ModelConfig
from shardwise.models import registry
from shardwise.models.common.decoder import Decoder
from shardwise.models.common.init import init_weights
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Request
from tests.support import toy

_WIDE = {"hidden_size": 64, "num_heads": 2, "vocab_size": 101, "max_seq_len": 64}
CONFIGS: dict[str, ModelConfig] = {
    "llama": toy.llama(**_WIDE | {"num_kv_heads": 1}),
    "everything": toy.llama(
        **_WIDE
        | {"num_heads": 10, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 72, "qk_norm": True}
        | {"qkv_bias": True, "o_bias": True, "sliding_window": 7, "window_start_layer": 1}
        | {"tie_embeddings": False}
    ),
    "gpt2": toy.gpt2(**_WIDE | {"ffn_size": 72}),
}


def model(name: str) -> Decoder:
    """A random model with large enough logits for its tokens to differ."""
    built = registry.build(CONFIGS[name])
    init_weights(built, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name_, parameter in built.named_parameters():
            # Layers that outweigh the embedding: a tied head would else repeat its input.
            noise = 0.02 if "embed" in name_ else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=noise)
    return built.eval()


def hf_weights(name: str) -> Iterator[tuple[str, Tensor]]:
    """As an engine streams them."""
    return registry.to_hf_tensors(CONFIGS[name], model(name).named_parameters())


def generator(name: str, dtype: torch.dtype = torch.float32, **options: object) -> Generator:
    """A loaded generator."""
    made = Generator(CONFIGS[name], dtype, **options)  # type: ignore[arg-type]
    made.update_weights(hf_weights(name))
    return made


def requests(num: int = 6) -> list[Request]:
    """Prompts of 1 to 11 tokens with 1 to 3 samples each."""
    return [
        Request(10 + i, [(7 * i + 3 * j) % 101 for j in range(1 + 2 * i)], 1 + i % 3, i)
        for i in range(num)
    ]
