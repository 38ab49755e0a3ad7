"""TensorBoard as a listener; the only file that imports it (extra ``watch``)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError


def require() -> None:
    """Raise ConfigError when tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            "logging.tensorboard is true, but tensorboard is not installed; "
            "pip install 'shardwise[watch]' or set logging.tensorboard=false"
        )


class TensorboardListener:
    """Writes scalars under ``<stage>/<name>`` into ``folder``."""

    def __init__(self, folder: Path) -> None:
        require()
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._folder = str(folder)
        self._writer: Any = SummaryWriter(self._folder)

    def log(self, stage: str, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        """Write finite scalars of one step."""
        for name, value in scalars.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def rewind(self, stage: str, step: int) -> None:
        """Tell TensorBoard that steps after ``step`` will be written again."""
        self._writer.close()
        self._writer = self._make(self._folder, purge_step=step + 1)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
