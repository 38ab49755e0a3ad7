"""A real Slurm of two nodes on this machine: two hosts and a head in network namespaces.

slurmctld and two slurmd of the distribution's packages, without systemd and without munge
(``auth/none``). Every host has its own network, name and /etc/hosts; files are shared, as on a
cluster's file system. A node has one core, so that a second job must wait or preempt.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "nsenter", "unshare")
ADDRESSES = {"n1": "10.78.0.1", "n2": "10.78.0.2", "ctl": "10.78.0.254"}

CONF = """\
ClusterName=shardwise
SlurmctldHost=ctl(10.78.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
SlurmdTimeout=20
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=10.78.0.1 CPUs=1 RealMemory=4000
NodeName=n2 NodeAddr=10.78.0.2 CPUs=1 RealMemory=4000
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
PartitionName=high Nodes=n1,n2 MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no such cluster here; "" if there can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    install = "apt-get install slurmctld slurmd slurm-client iproute2"
    return f"no {', '.join(absent)}: {install}" if absent else ""


class SlurmCluster:
    """Started by `start`; `stop` leaves no process, no namespace and no mount behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tag = uuid.uuid4().hex[:5]
        self.spaces = {host: f"sw{tag}{host}" for host in ADDRESSES}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Hosts, then daemons, until both nodes are idle. Raises RuntimeError."""
        (self.folder / "state").mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder))
        hosts = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in ADDRESSES.items())]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        for space in self.spaces.values():
            _run("ip", "netns", "add", space)
        ctl = self.spaces["ctl"]
        _run("ip", "-n", ctl, "link", "add", "switch", "type", "bridge")
        for host, address in ADDRESSES.items():
            space, device = self.spaces[host], "switch"
            if host != "ctl":
                device = "eth0"
                _run(
                    *("ip", "link", "add", device, "netns", space, "type", "veth"),
                    *("peer", "name", host, "netns", ctl),
                )
                _run("ip", "-n", ctl, "link", "set", host, "master", "switch", "up")
            _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", space, "link", "set", device, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
        self._daemon("ctl", "slurmctld", "-D")
        for host in ("n1", "n2"):
            self.boot(host)
        self.until(lambda: self.states() == {"n1": "idle", "n2": "idle"}, 60, "nodes are idle")

    def boot(self, host: str) -> None:
        """Start a node's slurmd."""
        self._daemon(host, "slurmd", "-D", "-N", host)

    def crash(self, host: str) -> None:
        """Everything that runs on a node dies at once, and its cable is pulled."""
        _run("ip", "-n", self.spaces["ctl"], "link", "set", host, "down")
        self._kill(host)

    def plug(self, host: str) -> None:
        """The cable is in again."""
        _run("ip", "-n", self.spaces["ctl"], "link", "set", host, "up")

    def on(self, host: str, *command: str) -> list[str]:
        """``command`` as it runs on a host."""
        inside = (
            f"mount --bind {shlex.quote(str(self.folder / 'hosts'))} /etc/hosts && "
            f'hostname {host} && exec "$@"'
        )
        space = f"--net=/run/netns/{self.spaces[host]}"
        return ["nsenter", space, "unshare", "-m", "-u", "sh", "-c", inside, "sh", *command]

    def call(
        self, *command: str, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the head, where jobs are submitted."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = subprocess.run(
            self.on("ctl", *command),
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done

    def states(self) -> dict[str, str]:
        """Of the nodes, as sinfo has them."""
        done = self.call("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t", check=False)
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job; {} while slurmctld does not answer."""
        done = self.call("scontrol", "--oneliner", "show", "job", number, check=False)
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)

    def until(self, holds: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait; raises RuntimeError with the daemons' last words."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {seconds:.0f} s: {what}\n{self.logs()}")
            time.sleep(0.2)

    def logs(self) -> str:
        """The end of what every daemon wrote."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n{f.read_text()[-2000:]}" for f in files)

    def stop(self) -> None:
        """End all of it, however far it came."""
        for host in self.spaces:
            self._kill(host)
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def _daemon(self, host: str, *command: str) -> None:
        environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        with (self.folder / f"{host}.out").open("ab") as out:
            self.daemons[host] = subprocess.Popen(
                self.on(host, *command), env=environment, stdout=out, stderr=out
            )

    def pids(self, host: str) -> list[int]:
        """Whatever runs in a host's network, which nothing outside of it does."""
        command = ["ip", "netns", "pids", self.spaces[host]]
        return [*map(int, subprocess.run(command, capture_output=True, text=True).stdout.split())]

    def _kill(self, host: str) -> None:
        while pids := self.pids(host):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        if host in self.daemons:
            self.daemons.pop(host).wait()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
