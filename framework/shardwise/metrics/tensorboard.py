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
    """Writes scalars under ``<stage>/<name>`` into ``folder``/<stage>.

    A folder for each stage: TensorBoard purges by step and by folder, so in a common one the resume
    of a stage would wipe out the curves of those before it.
    """

    def __init__(self, folder: Path) -> None:
        require()
        self._folder = folder
        self._writers: dict[str, Any] = {}

    def _open(self, stage: str, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._folder / stage), purge_step=purge_step)
        self._writers[stage] = writer
        return writer

    def log(self, stage: str, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        """Write finite scalars of one step."""
        writer = self._writers.get(stage) or self._open(stage)
        for name, value in scalars.items():
            writer.add_scalar(f"{stage}/{name}", value, step)

    def rewind(self, stage: str, step: int) -> None:
        """Tell TensorBoard that steps after ``step`` will be written again."""
        if stage in self._writers:
            self._writers[stage].close()
        self._open(stage, purge_step=step + 1)

    def close(self) -> None:
        """Flush and close."""
        for writer in self._writers.values():
            writer.close()
