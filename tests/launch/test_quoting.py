"""Any recipe path and override reaches the ranks as given, through every scheduler's file."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.config import yaml12
from shardwise.launch import kubernetes, skypilot, slurm
from shardwise.launch.cluster import ClusterJob, Task
from shardwise.launch.profile import (
    ClusterProfile,
    KubernetesProfile,
    SkyPilotProfile,
    SlurmProfile,
)
from tests.launch.test_kubernetes import expanded

VARIABLES = {
    "PATH": "/usr/bin:/bin",
    "HF_TOKEN": "leaked",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n1",
    "SLURM_CPUS_PER_TASK": "1",
    "JOB_COMPLETION_INDEX": "0",
    "JOB_UID": "u",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NODE_IPS": "10.0.0.1",
    "SKYPILOT_TASK_ID": "t",
}
SCRIPTS: dict[str, Callable[[ClusterJob], str]] = {
    "slurm": slurm.render,
    "kubernetes": lambda job: expanded(
        yaml12.parse(kubernetes.render(job), "").data["spec"]["replicatedJobs"][0]["template"][
            "spec"
        ]["template"]["spec"]["containers"][0]["command"][2],
        VARIABLES,
    ),
    "skypilot": lambda job: yaml12.parse(skypilot.render(job), "").data["run"],
}
SAFE = {"exclude_categories": ("Cs", "Cc", "Zl", "Zp", "Cf", "Co", "Cn")}
TEXT = st.text(st.one_of(st.sampled_from("'\"$`\\()!*~#&;|<> \t\n{}=-"), st.characters(**SAFE)))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", SCRIPTS)
@settings(max_examples=40, deadline=None)
@given(words=st.lists(TEXT.map("k=".__add__), max_size=3), name=TEXT.map(lambda t: t + "x"))
def test_a_shell_reads_back_every_path_and_override(
    target: str, words: list[str], name: str
) -> None:
    """The shell is a real one; in it, what would start the ranks prints its arguments."""
    folder = f"/tmp/{name}"
    profile = ClusterProfile(
        shared="/tmp",
        cpu_ranks=1,
        preflight=False,
        image="x",
        slurm=SlurmProfile(container="apptainer"),
        kubernetes=KubernetesProfile(claim="c", kind="jobset"),
        skypilot=SkyPilotProfile(volume="v"),
    )
    task = Task(f"{folder}/run", (f"{name}.yaml", *words))
    told = "printf '%s\\0'"
    stubs = dict.fromkeys(("srun", "python", "apptainer"), told + ' "$@"')
    stubs |= {"cd": told + ' "$1"', "scontrol": "echo n1"}
    head = "".join(f"{name}() {{ {body}; }}\n" for name, body in stubs.items())
    script = SCRIPTS[target](ClusterJob("run", task, 1, folder, 25.0, profile))
    done = subprocess.run(
        ["/bin/sh"], input=(head + script).encode(), env=VARIABLES, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode().split("\0")
    assert said[0] == folder
    at = said.index("train") + 1
    assert said[at : at + 1 + len(words)] == list(task.words)
    assert said[said.index("decide") + 1] == task.run_dir
