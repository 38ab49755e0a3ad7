"""`launch local --dry-run`: what would be started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.config.load import load_config
from shardwise.launch.local import rank_environment
from shardwise.parallel.layout import parse_layout
from shardwise.stages.run import preflight


def plan_local(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str], nproc: int
) -> dict[str, Any]:
    """Check a recipe for ``nproc`` ranks and describe them; starts nothing.

    Port 0 stands for one that the kernel will choose. Raises ConfigError like `train`.
    """
    loaded = load_config(config, overrides)
    run = loaded.config
    preflight(run, nproc, loaded.provenance)
    return {
        "run_dir": str(run.directory),
        "nproc": nproc,
        "logs": str(run.directory / "logs"),
        "stages": [
            {"name": stage.name, "layout": str(parse_layout(stage.engine.layout, nproc))}
            for stage in run.stages
        ],
        "environment": rank_environment(nproc, port=0),
    }


def default_nproc() -> int:
    """One process for each GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())
