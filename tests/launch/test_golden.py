"""The files in launch/ are what `shardwise launch` renders for the profiles beside them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from shardwise.config import yaml12
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[2]
LAYOUTS = [f"stages.{name}.engine.layout=auto" for name in ("pretrain", "sft", "grpo")]
WORDS = [
    "configs/quickstart.yaml", "engine.layout=auto", *LAYOUTS,
    "stages.pretrain.batch.global_batch=64", "run_dir=/shared/runs/quickstart", "--nodes", "2",
]  # fmt: skip
FILES = {
    "slurm.sh": ("slurm", "slurm"),
    "slurm-container.sh": ("slurm", "slurm-container"),
    "kubernetes-trainjob.yaml": ("kubernetes", "kubernetes"),
    "kubernetes-jobset.yaml": ("kubernetes", "kubernetes"),
    "skypilot.yaml": ("skypilot", "skypilot"),
}


def rendered(file: str, folder: Path, shardwise: Command) -> str:  # noqa: F811
    target, name = FILES[file]
    text = (ROOT / "launch" / "profiles" / f"{name}.yaml").read_text()
    if file.endswith("jobset.yaml"):
        text = text.replace("kind: trainjob", "kind: jobset")
    profile = folder / "profile.yaml"
    profile.write_text(text)
    code, out, err = shardwise("launch", target, *WORDS, "--profile", profile, "--dry-run")
    assert code == 0, err
    return out


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_what_is_rendered(
    file: str,
    tmp_path: Path,
    shardwise: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``GOLDEN=write pytest tests/launch/test_golden.py`` writes them anew."""
    monkeypatch.chdir(ROOT)
    text = rendered(file, tmp_path, shardwise)
    golden = ROOT / "launch" / file
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert golden.read_text() == text
    if file.endswith(".sh"):
        assert subprocess.run(["sh", "-n", golden]).returncode == 0
    else:
        for document in text.split("---\n"):
            assert yaml12.parse(document, file).data
