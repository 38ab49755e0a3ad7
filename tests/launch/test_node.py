"""The script of one node, where the scheduler starts one on each: who decides, who waits."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from shardwise.launch import skypilot
from shardwise.launch.cluster import ClusterJob, Task
from shardwise.launch.profile import ClusterProfile, SkyPilotProfile

# In place of the interpreter: the agents end as they are told or wait for a signal, then 85 is
# decided.
STUB = """\
#!/bin/sh
case "$*" in
*"launch decide"*) echo "$*" > {folder}/decided; exit 85 ;;
*doctor*) echo doctor > {folder}/checked; exit {doctor} ;;
esac
trap 'echo asked > {folder}/asked; sleep 0.2; exit 1' TERM
touch {folder}/started
[ {code} = wait ] || exit {code}
while :; do sleep 0.05; done
"""


def start(folder: Path, node: int, code: str, doctor: int = 0) -> subprocess.Popen[bytes]:
    stub = folder / "python"
    stub.write_text(STUB.format(folder=folder, code=code, doctor=doctor))
    stub.chmod(0o755)
    profile = ClusterProfile(
        shared=str(folder), cpu_ranks=1, python=str(stub), skypilot=SkyPilotProfile(volume="v")
    )
    task = Task(f"{folder}/run", ("r.yaml",))
    job = ClusterJob("x", task, 2, ".", grace_s=-14.5, profile=profile)  # so that patience is 1 s
    given = {"SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NODE_IPS": "a\nb", "SKYPILOT_TASK_ID": "t"}
    script = skypilot.document(job)["run"]
    return subprocess.Popen(["/bin/sh", "-c", script], env={**os.environ, **given}, cwd=folder)


@pytest.mark.parametrize(
    ("node", "code", "expected", "decides"),
    [(0, "1", 85, True), (0, "0", 85, True), (1, "1", 85, False), (1, "0", 0, False)],
)
def test_the_first_node_decides(
    tmp_path: Path, node: int, code: str, expected: int, decides: bool
) -> None:
    assert start(tmp_path, node, code).wait() == expected
    assert (tmp_path / "decided").exists() == decides and (tmp_path / "checked").exists()
    if decides:
        assert f"--code {code}" in (tmp_path / "decided").read_text()


def test_nothing_is_trained_on_nodes_that_fail_the_preflight(tmp_path: Path) -> None:
    assert start(tmp_path, 0, "0", doctor=1).wait() == 85
    assert not (tmp_path / "started").exists()
    assert "--code 1" in (tmp_path / "decided").read_text()


def test_a_request_to_stop_reaches_the_agent_which_is_waited_for(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "wait")
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 85
    assert (tmp_path / "asked").exists() and "--code 1" in (tmp_path / "decided").read_text()
