"""SkyPilot: a managed job, started again by SkyPilot when its nodes are lost or it asks for that.

https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

from __future__ import annotations

import re
import tempfile
from typing import Any

from shardwise.config import yaml12
from shardwise.errors import ExitCode
from shardwise.launch.cluster import ClusterJob, fill, hand_over, need_secrets
from shardwise.launch.profile import SkyPilotProfile

PORT = 29400


def render(job: ClusterJob) -> str:
    """The task, as ``sky jobs launch`` takes it."""
    return yaml12.readable(document(job))


def document(job: ClusterJob) -> dict[str, Any]:
    """The task as plain data."""
    sky, profile = _section(job), job.profile
    resources = {
        "infra": sky.infra,
        "accelerators": f"{sky.accelerator}:{profile.gpus}" if profile.gpus else None,
        "cpus": sky.cpus,
        "memory": sky.memory,
        "disk_size": sky.disk_size,
        "use_spot": sky.spot,
        "image_id": f"docker:{profile.image}" if profile.image else None,
        "job_recovery": {"recover_on_exit_codes": [int(ExitCode.REQUEUE)]},
    }
    script = fill(
        "node.sh.j2",
        job,
        target="skypilot",
        attempt='"skypilot.$SKYPILOT_TASK_ID.$(cat "$run/attempts.jsonl" 2>/dev/null | wc -l)"',
        node='"$SKYPILOT_NODE_RANK"',
        head='$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
        port=PORT,
        alone=[profile.python],
    )
    task = {
        "name": re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-"),
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": {key: value for key, value in resources.items() if value is not None},
        "volumes": {profile.shared: sky.volume},
        "secrets": dict.fromkeys(profile.secrets),
        "run": script,
    }
    return {key: value for key, value in task.items() if value != {}}


def submit(job: ClusterJob, text: str) -> str:
    """Give the task to SkyPilot's queue of managed jobs; returns what it says.

    Values of secrets go from this environment to SkyPilot, by name.
    Raises as `hand_over` and `need_secrets`.
    """
    need_secrets(job)
    secrets = [word for name in job.profile.secrets for word in ("--secret", name)]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:  # sky reads no stdin
        file.write(text)
        file.flush()
        command = ["sky", "jobs", "launch", "--yes", "--detach-run", *secrets, file.name]
        said = hand_over(command, "")
    return said.splitlines()[-1] if said else ""


def _section(job: ClusterJob) -> SkyPilotProfile:
    assert job.profile.skypilot is not None
    return job.profile.skypilot
