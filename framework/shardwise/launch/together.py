"""Commands that write no run folder, on several ranks of this machine: `generate` and `serve`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.errors import UserError
from shardwise.launch.local import launch_local

RESULT = "result.json"


def is_rank() -> bool:
    """Whether this process is one of several that torchrun, or `start`, has started."""
    return "RANK" in os.environ


def start(target: str, said: Mapping[str, Any], nproc: int) -> Any:
    """``target(said, folder)`` on ``nproc`` ranks; what rank 0 left there in RESULT, or None.

    The ranks' logs lie in ``folder``, which stays if they fail. Raises LaunchError.
    """
    folder = Path(tempfile.mkdtemp(prefix="shardwise-"))
    launch_local(target, [dict(said), str(folder)], nproc, folder)
    result = folder / RESULT
    found = json.loads(result.read_text()) if result.exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    return found


def check_world(tp: int) -> None:
    """Raises UserError where torchrun has started other than ``tp`` ranks."""
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) != tp:
        raise UserError(f"--tp {tp}: torchrun has started {world} ranks; give --tp {world}")
