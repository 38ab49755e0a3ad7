"""The batch script of a job: what it holds, what a shell makes of it, a run through a requeue."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.launch import slurm
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


def test_two_nodes_train_through_a_requeue(
    cluster: Cluster, tmp_path: Path, shardwise: Command  # noqa: F811
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path, steps=400)
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
    assert 3 < attempt.reached["pretrain"] < 400
    second = cluster.start(restarts=1)
    printed, _ = second.communicate(timeout=240)
    assert (second.returncode, cluster.requeued) == (0, False), printed
    _, last = attempts.read(tmp_path / "run")
    assert last.start == attempt.reached and last.exit_code == 0
    assert last.id == attempt.id.removesuffix(".0") + ".1"
    steps = [
        json.loads(line)["step"] for line in metrics.read_text().splitlines() if "grad_norm" in line
    ]
    assert steps == list(range(1, 401))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map("k=".__add__),
        max_size=3,
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1),
)
def test_a_shell_reads_back_every_path_and_override(words: list[str], name: str) -> None:
    """Through a real shell: the fake srun prints what the agents would be started with."""
    folder = f"/tmp/{name}"
    script = slurm.render(job(folder, f"{name}.yaml", *words), [])
    told = "printf '%s\\0'"
    tools = f'cd() {{ {told} "$1"; }}; srun() {{ {told} "$@"; }}; python() {{ {told} "$@"; }}\n'
    script = script.replace("#!/bin/sh\n", f"scontrol() {{ echo n1; }}\n{tools}")
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(["/bin/sh"], input=script, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\0")
    assert said[0] == folder
    at = said.index("train")
    assert said[at + 1 : at + 2 + len(words)] == [f"{name}.yaml", *words]
    assert said[said.index("decide") + 1] == f"{folder}/run"
