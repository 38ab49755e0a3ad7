"""The batch script of a job: what it holds, what a shell makes of it, a run through a requeue."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from shardwise.launch.cluster import ClusterJob, Task
from shardwise.launch.profile import ClusterProfile, SlurmProfile
from shardwise.resilience import attempts
from tests.cli.conftest import Command, shardwise, write_recipe  # noqa: F401  # a fixture
from tests.launch.fake_slurm import Cluster

PROFILE = """\
shared: {folder}
cpu_ranks: 1
python: {python}
env: {{GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: "1"}}
preflight: false
slurm: {{partition: low, time: "1:00:00"}}
"""


def write_profile(folder: Path, *edits: tuple[str, str]) -> Path:
    text = PROFILE.format(folder=folder, python=sys.executable)
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """A fake Slurm on PATH, in a folder that all its nodes see."""
    monkeypatch.chdir(tmp_path)
    found = Cluster(tmp_path / "slurm")
    for name, value in found.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(write_profile(tmp_path)))
    return found


def job(folder: str = "/shared", *words: str, **profile: object) -> ClusterJob:
    section = {"slurm": SlurmProfile(), "cpu_ranks": 1, "preflight": False, **profile}
    whole = ClusterProfile(shared="/shared", **section)  # type: ignore[arg-type]
    return ClusterJob("run", Task(f"{folder}/run", words), 2, folder, 25.0, whole)


@pytest.mark.slow
def test_two_nodes_train_through_a_requeue(
    cluster: Cluster, tmp_path: Path, shardwise: Command  # noqa: F811
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path, steps=80)
    code, out, err = shardwise("launch", "slurm", recipe, "--nodes", "2", "name=two nodes")
    assert code == 2 and "name" in err and not cluster.script.exists()
    code, out, _ = shardwise(
        "launch", "slurm", recipe, "--nodes", "2", "stages.0.validation.every=0"
    )
    assert code == 0 and "slurm job 4711: 2 x 1 ranks" in out
    first = cluster.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while first.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert first.poll() is None, first.communicate()
    cluster.signal(signal.SIGUSR1)
    printed, _ = first.communicate(timeout=120)
    assert (first.returncode, cluster.requeued) == (85, True), printed
    [attempt] = attempts.read(tmp_path / "run")
    assert attempt.exit_code == 85 and attempt.world == 2 and attempt.scheduler == "slurm"
    assert 3 < attempt.reached["pretrain"] < 80
    second = cluster.start(restarts=1)
    printed, _ = second.communicate(timeout=240)
    assert (second.returncode, cluster.requeued) == (0, False), printed
    _, last = attempts.read(tmp_path / "run")
    assert last.start == attempt.reached and last.exit_code == 0
    assert last.id == attempt.id.removesuffix(".0") + ".1"
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if "grad_norm" in line
    ]
    assert steps == list(range(1, 81))
