"""An adapter that no weights can hold, on its way to a sampler: beside those of the base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from shardwise.adapters.targets import is_adapter
from shardwise.config.schema import ModelConfig
from shardwise.models import registry

Named = Iterable[tuple[str, Tensor]]


def to_hf_tensors(config: ModelConfig, named: Named) -> Iterator[tuple[str, Tensor]]:
    """See `models.registry.to_hf_tensors`; an adapter's parameters follow, under our names."""
    return _apart(config, named, registry.to_hf_tensors)


def from_hf_tensors(config: ModelConfig, named: Named) -> Iterator[tuple[str, Tensor]]:
    """What `to_hf_tensors` made, under our names."""
    return _apart(config, named, registry.from_hf_tensors)


def _apart(
    config: ModelConfig,
    named: Named,
    rename: Callable[[ModelConfig, Named], Iterator[tuple[str, Tensor]]],
) -> Iterator[tuple[str, Tensor]]:
    own: list[tuple[str, Tensor]] = []

    def base() -> Iterator[tuple[str, Tensor]]:
        for name, value in named:
            if is_adapter(name):
                own.append((name, value))
            else:
                yield name, value

    yield from rename(config, base())
    yield from own
