"""The comparison of FP8 with bf16, dry on CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.gpu import fp8


@pytest.mark.slow
def test_dry_run() -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, str(Path(fp8.__file__)), "--device", "cpu", "--dry-run"]
    done = subprocess.run(
        [*command, "--recipes", "delayed", "mxfp8"],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "{" in done.stdout, done.stderr[-3000:]
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert (done.returncode, result["failures"]) == (0, [])
    assert set(result["speed_to_bf16"]) == {"bf16", "delayed", "mxfp8"}
    assert result["computed_by"]["mxfp8"].startswith("emulated: Transformer Engine runs on CUDA")
