"""A checksum of weights, to prove that what generates is what was trained (trap: stale weights).

Both sides hash the same thing: every parameter under our name, cast to the dtype that is served.
The order in which tensors arrive does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import xxhash
from torch import Tensor

from shardwise.config.schema import ModelConfig
from shardwise.models import registry


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and values."""
    flat = tensor.detach().contiguous().cpu()
    hasher = xxhash.xxh3_128(f"{flat.dtype}{tuple(flat.shape)}".encode())
    if flat.numel():  # of nothing, PyTorch may have no bytes to show
        hasher.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def combine(digests: Mapping[str, str]) -> str:
    """One checksum from the digests of all tensors, by name."""
    text = "\n".join(f"{name} {digests[name]}" for name in sorted(digests))
    return xxhash.xxh3_128_hexdigest(text.encode())


def first_unlike(
    named: Iterable[tuple[str, Tensor]], served: Mapping[str, Tensor], dtype: torch.dtype
) -> str:
    """The first of the trainer's weights (our names) that is served otherwise; empty: none is."""
    digests = {name: digest(tensor) for name, tensor in served.items()}
    unlike = [n for n, t in named if digests.pop(n, None) != digest(t.to(dtype))]
    return next(iter((*unlike, *digests)), "")


def weights_checksum(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """The checksum of weights under our names, as they are served in ``dtype``."""
    return combine({name: digest(tensor.to(dtype)) for name, tensor in named})


def stream_checksum(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> str:
    """What `RolloutEngine.update_weights` must return for ``weights`` (Hugging Face names)."""
    return weights_checksum(registry.from_hf_tensors(config, weights), dtype)
