"""Slots: cores or GPUs that one trial at a time has for itself, so that trials do not disturb."""

from __future__ import annotations

import dataclasses
import os

from shardwise.errors import ConfigError
from shardwise.metrics.meters import num_cores
from shardwise.sweep.config import SlotsConfig


@dataclasses.dataclass(frozen=True)
class Slot:
    """``cores``: what a trial's processes are bound to; ``gpus``: what they see (None: all)."""

    number: int
    cores: tuple[int, ...]
    gpus: tuple[str, ...] | None

    def __str__(self) -> str:
        said = f"cores {_ranges(self.cores)}"
        return said + (f", GPUs {', '.join(self.gpus)}" if self.gpus else "")


def slots(
    config: SlotsConfig, cores: list[int] | None = None, gpus: list[str] | None = None
) -> list[Slot]:
    """The slots that a sweep asks for, of this machine's ``cores`` and ``gpus``.

    Raises ConfigError for more than there is.
    """
    cores = usable_cores() if cores is None else cores
    gpus = usable_gpus() if gpus is None else gpus
    number = config.number
    each = config.cores if config.cores is not None else len(cores) // number
    _enough(number, each, len(cores), "core", "cores")
    seen = config.gpus if config.gpus is not None else len(gpus) // number
    if config.gpus is None and gpus and not seen:
        raise ConfigError(
            f"slots.number: {number}, and there are {len(gpus)} GPUs; say gpus: 0 for trials on "
            "cores alone"
        )
    if seen:
        _enough(number, seen, len(gpus), "GPU", "gpus")
    elif config.gpus:
        _enough(number, config.gpus, len(gpus), "GPU", "gpus")
    return [
        Slot(
            i,
            tuple(cores[i * each : (i + 1) * each]),
            tuple(gpus[i * seen : (i + 1) * seen]) if gpus else None,
        )
        for i in range(number)
    ]


def _enough(number: int, each: int, there: int, what: str, key: str) -> None:
    if number * max(each, 1) <= there:
        return
    many = "s" if there != 1 else ""
    raise ConfigError(
        f"slots: {number} of {max(each, 1)} {what}{'s' if each > 1 else ''} are "
        f"{number * max(each, 1)}, and this process may use {there} {what}{many}; "
        f"lower slots.number or slots.{key}"
    )


def usable_cores() -> list[int]:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(num_cores()))


def usable_gpus() -> list[str]:
    """GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    count = torch.cuda.device_count()
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    return said.split(",")[:count] if said else [str(i) for i in range(count)]


def _ranges(cores: tuple[int, ...]) -> str:
    """``0-3, 8``."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
