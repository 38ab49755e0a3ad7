"""A cluster's profile: what a job must know of the place it runs in, apart from any recipe.

One YAML file a cluster, named by ``--profile`` or ``$SHARDWISE_CLUSTER``. It holds names of secrets
(variables of the environment, keys of a Kubernetes secret), never their values.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.load import load_section
from shardwise.config.redact import redact_data
from shardwise.config.section import PositiveInt, Section
from shardwise.errors import ConfigError

VARIABLE = "SHARDWISE_CLUSTER"
TOOLS = {"slurm": "sbatch", "kubernetes": "kubectl", "skypilot": "sky"}  # that take a job

# One word in a scheduler's own lines, where no shell quotes: no spaces, quotes, # or backslashes.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:=@+/*&|()\[\]-]+$", max_length=200)]
Folder = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_.@+/-]*$", max_length=500)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=200)]
Mount = Annotated[str, Field(pattern=r"^/[A-Za-z0-9_.@+/-]*:/[A-Za-z0-9_.@+/-]*(:ro)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=63)]
Memory = Annotated[str, Field(pattern=r"^[0-9]+[KMGT]?$")]


class SlurmProfile(Section):
    """What sbatch and srun are told."""

    partition: Word | None = Field(None, description="default: the cluster's own")
    account: Word | None = Field(None, description="who pays")
    qos: Word | None = Field(None, description="quality of service")
    time: str | None = Field(
        None,
        pattern=r"^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$",
        description="limit of one attempt, as sbatch takes it; default: the partition's",
    )
    constraint: Word | None = Field(None, description="features that all nodes must have")
    reservation: Word | None = Field(None, description="nodes kept for us")
    exclude: Word | None = Field(None, description="nodes that are not to be used")
    cpus_per_node: PositiveInt | None = Field(
        None, description="cores a node; default: one a CPU rank, what the partition gives to GPUs"
    )
    memory: Memory | None = Field(None, description="a node's; 0: all of it")
    exclusive: bool = Field(False, description="whole nodes")
    gpu_type: Word | None = Field(None, description="as --gpus-per-node names it")
    max_nodes: PositiveInt | None = Field(None, description="that a job of ours may ask for")
    signal_s: PositiveInt = Field(
        300, description="seconds before the time limit at which a run saves and is requeued"
    )
    container: Literal["pyxis", "apptainer"] | None = Field(
        None, description="what runs `image`; pyxis is enroot's plugin of srun"
    )
    mounts: list[Mount] = Field([], description="of the container, FROM:TO; default: `shared`")


class KubernetesProfile(Section):
    """What a TrainJob or JobSet is told."""

    kind: Literal["trainjob", "jobset"] = Field(
        "trainjob", description="Kubeflow Trainer's TrainJob, or a plain JobSet"
    )
    namespace: Name = Field("default", description="where its objects are made")
    claim: Name = Field(description="the persistent volume claim that is mounted at `shared`")
    secret: Name | None = Field(None, description="the Kubernetes secret that holds `secrets`")
    service_account: Name | None = Field(None, description="of the pods")
    queue: Name | None = Field(None, description="a local queue of Kueue")
    gpu: Word = Field("nvidia.com/gpu", description="the resource that is a GPU")
    cpus: PositiveInt | None = Field(None, description="cores a node; default: one a CPU rank")
    memory: Annotated[str, Field(pattern=r"^[0-9]+([EPTGMk]i?)?$")] | None = Field(
        None, description="a node's, as Kubernetes writes it"
    )
    shared_memory: Annotated[str, Field(pattern=r"^[0-9]+([EPTGMk]i?)?$")] = Field(
        "16Gi", description="of /dev/shm, through which ranks of a node talk"
    )
    node_selector: dict[str, str] = Field({}, description="labels that its nodes have")
    max_restarts: PositiveInt = Field(100, description="of a job, whatever the reason")
    max_nodes: PositiveInt | None = Field(None, description="that a job of ours may ask for")


class SkyPilotProfile(Section):
    """What a task of SkyPilot is told."""

    infra: Word | None = Field(None, description="aws, k8s/context, ...; default: the cheapest")
    accelerator: Word | None = Field(None, description="the GPU as SkyPilot names it, e.g. H100")
    spot: bool = Field(False, description="machines that may be taken away, for less")
    cpus: Word | None = Field(None, description="cores a node, e.g. 8+")
    memory: Word | None = Field(None, description="GiB a node, e.g. 32+")
    disk_size: PositiveInt | None = Field(None, description="GB a node")
    volume: Name = Field(
        description="the volume of SkyPilot's that is mounted at `shared`; a bucket is none, since "
        "checkpoints are committed by renaming folders"
    )
    max_nodes: PositiveInt | None = Field(None, description="that a job of ours may ask for")


class ClusterProfile(Section):
    """One cluster."""

    shared: Folder = Field(description="the folder that all nodes see; runs live in it")
    workdir: Folder | None = Field(
        None, description="where jobs run, on the nodes; default: the folder `launch` is called in"
    )
    python: str = Field(
        "python", min_length=1, description="the interpreter on the nodes, in the image if any"
    )
    gpus: PositiveInt | None = Field(None, description="GPUs a node: one rank for each")
    cpu_ranks: PositiveInt | None = Field(None, description="ranks a node without GPUs")
    env: dict[Variable, str] = Field(
        {},
        description="variables of every rank, as the interconnect's",
        examples=[{"NCCL_SOCKET_IFNAME": "ib0"}],
    )
    secrets: list[Variable] = Field([], description="names of variables whose values are secret")
    setup: list[str] = Field([], description="lines of shell before the ranks start, as module")
    image: str | None = Field(
        None, pattern=r"^\S+$", description="the container's; default: none, or the runtime's"
    )
    preflight: bool = Field(True, description="doctor --cluster on every node before step 1")
    slurm: SlurmProfile | None = Field(None, description="what sbatch and srun are told")
    kubernetes: KubernetesProfile | None = Field(None, description="what pods are told")
    skypilot: SkyPilotProfile | None = Field(None, description="what SkyPilot is told")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.gpus is None) == (self.cpu_ranks is None):
            raise ValueError("say how many ranks a node has: gpus, or cpu_ranks, and not both")
        if not (self.slurm or self.kubernetes or self.skypilot):
            raise ValueError("which scheduler is it? Give slurm, kubernetes or skypilot")
        if self.slurm and (self.slurm.container is None) != (self.image is None):
            raise ValueError("image and slurm.container go together; give both or none")
        if self.kubernetes and self.image is None:
            raise ValueError("image: pods need one")
        if self.kubernetes and self.secrets and self.kubernetes.secret is None:
            raise ValueError("kubernetes.secret: which secret of the namespace holds `secrets`?")
        if self.skypilot and (self.gpus is None) != (self.skypilot.accelerator is None):
            raise ValueError("gpus and skypilot.accelerator go together; give both or none")
        if self.slurm and self.slurm.time and _seconds(self.slurm.time) <= self.slurm.signal_s:
            self.refuse(("slurm", "time"), "leaves nothing before slurm.signal_s; raise it")
        for key, value in self.env.items():
            if any(ord(letter) < 32 for letter in value):
                self.refuse(("env", key), "holds a line break or a control character")
        names: Any = {"secrets": True, "kubernetes": {"secret"}}
        plain: Any = self.model_dump(mode="json", exclude=names)
        for key, clean in redact_data(plain).items():
            if clean != plain[key]:
                self.refuse((key,), "holds what looks like a secret; name its variable in secrets")
        return self

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        return self.gpus or self.cpu_ranks or 1


def _seconds(time: str) -> int:
    """Slurm's [D-]H[:M[:S]] and M[:S]."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds
    minutes, seconds = [*parts, 0][:2]
    return 60 * minutes + seconds


def find_profile(given: Path | None) -> Path:
    """The profile that is meant: ``--profile``, else ``$SHARDWISE_CLUSTER``. Raises ConfigError."""
    path = given or Path(os.environ.get(VARIABLE, ""))
    if path == Path():
        raise ConfigError(
            f"which cluster? Give --profile PROFILE.yaml, or name it once in ${VARIABLE}; "
            "docs/cluster.md shows one to begin with"
        )
    return path


def load_profile(path: Path) -> ClusterProfile:
    """Read a profile. Raises ConfigError with every problem: key, line, what is allowed."""
    return load_section(path, ClusterProfile)


def missing(profile: ClusterProfile) -> list[str]:
    """What a profile names that is not here, in words; to be asked where jobs are submitted."""
    found = [
        f"secrets: {name} is not in the environment"
        for name in profile.secrets
        if not profile.kubernetes and not os.environ.get(name)
    ]
    for target, tool in TOOLS.items():
        if getattr(profile, target) is not None and shutil.which(tool) is None:
            found.append(f"{target}: there is no command {tool} here")
    if (slurm := profile.slurm) is not None:
        folders = {"shared": profile.shared, "workdir": profile.workdir}
        folders |= {f"slurm.mounts.{i}": m.split(":")[0] for i, m in enumerate(slurm.mounts)}
        if slurm.container == "apptainer" and f"{profile.image}".startswith("/"):
            folders["image"] = profile.image
        if slurm.container is None and profile.python.startswith("/"):
            folders["python"] = profile.python
        for key, folder in folders.items():
            if folder is not None and not Path(folder).exists():
                found.append(f"{key}: {folder} does not exist here")
        if slurm.time is None:
            found.append("slurm.time: not given; the partition's default may be minutes")
    return found
