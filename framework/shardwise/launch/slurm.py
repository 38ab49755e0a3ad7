"""Slurm: a batch script with one torchrun agent a node, and its submission."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.launch.cluster import ClusterJob, Task, fill, hand_over, need_secrets
from shardwise.launch.profile import SlurmProfile


def render(job: ClusterJob, tasks: Sequence[Task] = (), at_once: int | None = None) -> str:
    """The batch script of a job.

    ``tasks``: an array of runs in place of the job's own one, each on nodes of its own,
    ``at_once`` of them at a time.
    """
    slurm = _section(job)
    gpus = f"{slurm.gpu_type}:{job.profile.gpus}" if slurm.gpu_type else job.profile.gpus
    given = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.time,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "exclude": slurm.exclude,
        "gpus-per-node": gpus,
        "cpus-per-task": slurm.cpus_per_node or job.profile.cpu_ranks,
        "mem": slurm.memory,
        "array": f"0-{len(tasks) - 1}" + (f"%{at_once}" if at_once else "") if tasks else None,
    }
    options = [f"{key}={value}" for key, value in given.items() if value is not None]
    options += ["exclusive"] if slurm.exclusive else []
    flags, wrapper = _container(job)
    python = [*wrapper, job.profile.python]
    # In a container of srun's, what runs on one node is a step too.
    alone = ["srun", "--nodes=1", "--ntasks=1", "--overlap", *flags] if flags else []
    return fill(
        "slurm.sh.j2",
        job,
        target="slurm",
        slurm=slurm,
        options=options,
        tasks=list(tasks),
        logs=logs(job),
        container=[*flags, *python],
        alone=[*alone, *python],
    )


def submit(job: ClusterJob, script: str) -> str:
    """Hand a rendered script to sbatch; returns the job's id.

    Raises ConfigError for what the cluster cannot run, and as `hand_over`.
    """
    need_secrets(job)
    check_nodes(_section(job), job.nodes)
    Path(logs(job)).mkdir(parents=True, exist_ok=True)
    return hand_over(["sbatch", "--parsable"], script).partition(";")[0]


def check_nodes(slurm: SlurmProfile, nodes: int = 1) -> None:
    """Refuse a partition that is none, whose nodes differ, or which has fewer, if sinfo tells.

    Every rank must find what the others find: torchrun starts the same number on each node, and
    the slowest sets the pace.
    """
    if shutil.which("sinfo") is None:
        return
    partition = ["--partition", slurm.partition] if slurm.partition else []
    command = ["sinfo", "--noheader", "--Node", *partition, "--format", "%P|%N|%c|%G|%f"]
    found = [line.split("|") for line in _asked(command) if line.count("|") == 4]
    rows = [row[1:] for row in found if partition or row[0].endswith("*")]  # * is the default's
    if not rows:
        known = _asked(["sinfo", "--noheader", "--format", "%R"])
        if partition and known and not {*known} & {*f"{slurm.partition}".split(",")}:
            raise ConfigError(
                f"slurm.partition: there is no {slurm.partition}; known: {', '.join(known)}"
            )
        return  # sinfo has no answer; sbatch will
    left_out = _asked(["scontrol", "show", "hostnames", slurm.exclude]) if slurm.exclude else []
    wanted = set(re.findall(r"\w+", slurm.constraint or ""))
    fit = [row for row in rows if row[0] not in left_out]
    fit = [row for row in fit if wanted <= {*row[3].split(",")}] or fit
    names, kinds = {row[0] for row in fit}, {(row[1], row[2]) for row in fit}
    where = slurm.partition or "the default partition"
    if len(names) < nodes:
        raise ConfigError(f"--nodes {nodes}: {where} has {len(names)} such nodes")
    if len(kinds) > 1:
        listed = "; ".join(f"{cores} cores, GPUs {gpus}" for cores, gpus in sorted(kinds))
        raise ConfigError(
            f"{where}: its nodes differ ({listed}), and a run needs the same on each; choose those "
            "of one kind by slurm.constraint or slurm.exclude in the profile"
        )


def _asked(command: list[str]) -> list[str]:
    """The lines that a command of Slurm's answers; none if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def logs(job: ClusterJob) -> str:
    """Where Slurm writes what a job prints."""
    return f"{job.profile.shared.rstrip('/')}/shardwise-logs"


def _section(job: ClusterJob) -> SlurmProfile:
    assert job.profile.slurm is not None
    return job.profile.slurm


def _container(job: ClusterJob) -> tuple[list[str], list[str]]:
    """Flags of srun, and what stands before the interpreter."""
    slurm, profile = _section(job), job.profile
    mounts = ",".join(slurm.mounts or [f"{profile.shared}:{profile.shared}"])
    if slurm.container == "pyxis":
        flags = {"image": profile.image, "mounts": mounts, "workdir": job.workdir}
        return [f"--container-{key}={value}" for key, value in flags.items()], []
    if slurm.container == "apptainer":
        gpus = ["--nv"] if profile.gpus else []
        return [], [
            "apptainer", "exec", *gpus, "--bind", mounts, "--pwd", job.workdir, f"{profile.image}",
        ]  # fmt: skip
    return [], []
