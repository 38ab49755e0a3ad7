"""Runs that an earlier version began go on bitwise: keys, spellings and random keys keep meaning.

``old_runs.zip`` holds two runs as commit 95d3de0 left them when they were killed, with the recipes
(``NAME.yaml``) and, in ``expected.json``, a hash of each stage's last tensors where that commit
ran them unbroken, but for two changes that round otherwise: a CPU sums rows for the gradient norm,
not a whole tensor one by one, and the head computes tokens with loss alone. Each time the hashes of
the stages concerned were taken anew; with the old way, the old ones came out. Numbers are those of
any x86-64 machine: PyTorch's kernels for no processor in particular, fp32, one thread, and none of
our own, as no compiler is on the path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import xxhash

from shardwise import checkpoint

ARCHIVE = Path(__file__).parents[1] / "fixtures" / "old_runs.zip"
PORTABLE = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["policies", pytest.param("dropout", marks=pytest.mark.slow)])
def test_an_old_run_goes_on_bitwise(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    finished = {p.parent: p.read_bytes() for p in tmp_path.glob(f"{name}/stages/*/result.json")}
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", "train", f"{name}.yaml", "--nproc", "1"],
        cwd=tmp_path,
        env={**os.environ, **PORTABLE, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed" in (tmp_path / name / "notes.jsonl").read_text()
    assert all((stage / "result.json").read_bytes() == old for stage, old in finished.items())
    expected = json.loads((tmp_path / "expected.json").read_text())
    wanted = {key.split("/")[1]: value for key, value in expected.items() if key.startswith(name)}
    found = {stage: digest(tmp_path / name / "stages" / stage) for stage in wanted}
    assert found == wanted


def digest(stage: Path) -> str:
    """xxh3-128 of all tensors of a stage's last checkpoint, by name."""
    total = xxhash.xxh3_128()
    for name, tensor in sorted(checkpoint.read_tensors(stage / "checkpoints")):
        total.update(name.encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()
