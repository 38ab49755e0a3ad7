"""launch/torchrun-multinode.sh: two agents on this machine; two hosts in network namespaces."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import write_recipe
from tests.support.pool import free_port

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "torchrun-multinode.sh"


def agent(rank: int, head: str, recipe: Path, *prefix: str, **settings: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment = inherited | {
        "NODE_RANK": str(rank),
        "HEAD": head,
        "PROCS": "1",
        "RUN_ID": recipe.parent.name,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    return subprocess.Popen(
        [*prefix, str(SCRIPT), str(recipe)],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(agents: list[subprocess.Popen], folder: Path) -> None:
    """Both agents end well, and the run is that of two ranks."""
    try:
        outputs = [a.communicate(timeout=180)[0] for a in agents]
    finally:
        for a in agents:
            a.kill()
            a.wait()
    assert [a.returncode for a in agents] == [0, 0], "\n=====\n".join(outputs)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["layout"].startswith("dp2")
    assert summary["stages"][0]["steps"] == 2
    reports = [output.count("report.html") for output in outputs]
    assert sorted(reports) == [0, 1]  # rank 0 speaks, on whichever node it is


def test_what_the_script_starts(tmp_path: Path) -> None:
    """One agent, whose rank 0 of two is this machine; what it is given goes to the ranks."""
    said = tmp_path / "python"
    said.write_text('#!/bin/sh\nprintf "%s\\n" "$GLOO_SOCKET_IFNAME" "$@"\n')
    said.chmod(0o755)
    settings = {"PYTHON": str(said), "INTERFACE": "eth7", "LOCAL_ADDR": "10.0.0.1", "NODES": "3"}
    out, _ = agent(0, "a:29400", tmp_path / "r.yaml", **settings).communicate(timeout=60)
    words = out.splitlines()
    assert words[:3] == ["eth7", "-m", "torch.distributed.run"]
    for name, value in [
        ("--nnodes", "3"), ("--node-rank", "0"), ("--nproc-per-node", "1"),
        ("--rdzv-endpoint", "a:29400"), ("--rdzv-id", tmp_path.name),
        ("--rdzv-conf", "is_host=true"), ("--local-addr", "10.0.0.1"), ("--max-restarts", "0"),
    ]:  # fmt: skip
        assert words[words.index(name) + 1] == value
    assert words[-4:] == ["-m", "shardwise", "train", str(tmp_path / "r.yaml")]


@pytest.mark.slow
def test_two_agents_train_to_the_end(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    head = f"127.0.0.1:{free_port()}"
    local = {"INTERFACE": "lo", "LOCAL_ADDR": "127.0.0.1"}
    finish([agent(rank, head, recipe, **local) for rank in range(2)], tmp_path)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, joined by a virtual cable: 10.77.0.1 and 10.77.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the `ip` command")
    tag = uuid.uuid4().hex[:6]
    names = [f"sw{tag}{i}" for i in range(2)]
    steps = [f"ip netns add {name}" for name in names]
    steps.append(f"ip link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
    for i, name in enumerate(names):
        steps += [
            f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev cable",
            f"ip -n {name} link set cable up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_train_to_the_end(tmp_path: Path, hosts: list[str]) -> None:
    recipe = write_recipe(tmp_path)
    agents = [
        agent(
            rank,
            "10.77.0.1:29400",
            recipe,
            *("ip", "netns", "exec", host),
            INTERFACE="cable",
            LOCAL_ADDR=f"10.77.0.{rank + 1}",
        )
        for rank, host in enumerate(hosts)
    ]
    finish(agents, tmp_path)


@pytest.mark.slow
def test_a_slow_cable_is_named_before_step_1(tmp_path: Path, hosts: list[str]) -> None:
    shape = f"ip netns exec {hosts[1]} tc qdisc add dev cable root tbf rate 40mbit burst 64k"
    done = subprocess.run([*shape.split(), "latency", "400ms"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no traffic shaping here: {done.stderr.strip()}")
    agents = [
        agent(
            rank,
            "10.77.0.1:29400",
            write_recipe(tmp_path),
            *("ip", "netns", "exec", host),
            INTERFACE="cable",
            LOCAL_ADDR=f"10.77.0.{rank + 1}",
            COMMAND="doctor --cluster --min-bandwidth 0.05",
        )
        for rank, host in enumerate(hosts)
    ]
    outputs = [a.communicate(timeout=180)[0] for a in agents]
    assert [a.returncode for a in agents] == [1, 1], outputs
    [failure] = [line for line in "".join(outputs).splitlines() if line.startswith("FAILED")]
    assert "the link" in failure and "is slow" in failure and "asked for 0.05" in failure
