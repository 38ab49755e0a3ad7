"""A job on a cluster: one description, which the renderers of Slurm, Kubernetes and SkyPilot read.

`prepare` checks a recipe against a cluster's profile before anything is rendered: what it lets
through runs there as it is, since launch changes no recipe.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from shardwise.config.load import LoadedConfig, load_config
from shardwise.config.redact import redact
from shardwise.errors import ConfigError, ShardwiseError
from shardwise.launch.profile import ClusterProfile
from shardwise.terminal import printable

SPARE_SECONDS = 15  # for ranks to end once their grace period is over, before torchrun kills them
# What torchrun passes on to its ranks; Slurm sends USR1 before the time is over.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: the words behind ``shardwise train`` (RECIPE, overrides), and the run's folder."""

    run_dir: str
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ClusterJob:
    """What is to run, and where. Paths are those of the nodes."""

    name: str
    task: Task
    nodes: int
    workdir: str
    grace_s: float
    profile: ClusterProfile

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        return self.profile.ranks

    @property
    def patience_s(self) -> int:
        """Seconds that the ranks have to end once they are asked to."""
        return math.ceil(self.grace_s) + SPARE_SECONDS


class SchedulerError(ShardwiseError):
    """The scheduler did not take the job; the message is its own."""


def prepare(
    target: str,
    config: str | Path,
    overrides: Sequence[str],
    nodes: int,
    profile: ClusterProfile,
    named: str = "profile",
) -> ClusterJob:
    """The job of a recipe on ``nodes`` nodes of a cluster; nothing is written or started.

    ``target``: slurm, kubernetes or skypilot; ``named``: the profile in messages. Raises
    ConfigError for what could not run there as it is, with the key, its place and the mend.
    """
    from shardwise.stages.run import preflight

    section = getattr(profile, target)
    if section is None:
        raise ConfigError(f"{named}: has no section {target}; add it, or launch on another")
    if not 1 <= nodes <= (section.max_nodes or nodes):
        raise ConfigError(
            f"--nodes {nodes}: from 1 to {section.max_nodes or 'as many as there are'} "
            f"({named}: {target}.max_nodes)"
        )
    # A path that begins like an option must not be read as one.
    recipe = f"./{config}" if str(config).startswith("-") else str(config)
    words = (recipe, *overrides)
    _refuse_unfit(words)
    loaded = load_config(config, overrides)
    run, world = loaded.config, nodes * profile.ranks
    # SkyPilot copies the working folder to every node and begins there.
    workdir = profile.workdir or ("." if target == "skypilot" else str(Path.cwd()))
    run_dir = os.path.normpath(os.path.join(workdir, run.directory))  # noqa: PTH118
    job = ClusterJob(
        run.name, Task(run_dir, words), nodes, workdir, run.resilience.grace_s, profile
    )
    _refuse_misfits(target, job, loaded, named)
    try:
        # Only a Slurm cluster sees here what its nodes see.
        preflight(run, world, loaded.provenance, here=False, files=target == "slurm")
    except ConfigError as error:
        if "engine.layout" not in str(error):
            raise
        said = re.sub(r"; use --nproc \d+", "", str(error))  # here it is the profile's word
        raise ConfigError(
            f"{said}\n  launch starts {world} ranks: --nodes {nodes} x {profile.ranks} a node "
            f"({named}: {'gpus' if profile.gpus else 'cpu_ranks'})"
        ) from error
    return job


def _refuse_unfit(words: Iterable[str]) -> None:
    """What may not stand in a file that people read, and others may read."""
    for number, word in enumerate(words):
        what = f"override {number}" if number else "the recipe's path"
        if redact(word) != word:
            raise ConfigError(
                f"{what} ({redact(word)}): holds what looks like a secret, and would stand in what "
                "is submitted; name its variable under secrets in the profile"
            )
        if printable(word) != word:
            raise ConfigError(f"{what}: holds a control character; remove it")


def _refuse_misfits(target: str, job: ClusterJob, loaded: LoadedConfig, named: str) -> None:
    """What `launch` would have to change in a recipe for it to run there."""
    profile, run = job.profile, loaded.config

    def at(key: str) -> str:
        source = loaded.provenance.get(key)
        return key if source is None or source.kind == "default" else f"{key} ({source})"

    elsewhere = f", or give {named} the workdir that the nodes have"
    recipe = os.path.normpath(os.path.join(job.workdir, job.task.words[0]))  # noqa: PTH118
    where = {at("run_dir"): job.task.run_dir, "the recipe": recipe}
    if job.workdir == ".":  # and with it the recipe
        if recipe.startswith(("/", "..")):
            raise ConfigError(f"{recipe}: is not in the folder that SkyPilot copies, {Path.cwd()}")
        del where["the recipe"]
    else:
        where["the working folder"] = job.workdir
    for what, path in where.items():
        if not Path(path).is_relative_to(profile.shared):
            raise ConfigError(
                f"{what}: {path} is not in {profile.shared}, the folder that all nodes see "
                f"({named}: shared); put it there{'' if profile.workdir else elsewhere}"
            )
    devices = {run.engine.device, *(stage.engine.device for stage in run.stages)}
    if profile.cpu_ranks and "cuda" in devices:
        raise ConfigError(
            f"{at('engine.device')}: cuda, but {named} gives ranks without GPUs (cpu_ranks); "
            "set engine.device=auto, or take a profile with gpus"
        )
    if profile.gpus and "cpu" in devices:
        raise ConfigError(
            f"{at('engine.device')}: cpu would leave the GPUs of {named} idle; "
            "set engine.device=auto, or take a profile with cpu_ranks"
        )
    if target == "slurm" and profile.slurm and job.patience_s >= profile.slurm.signal_s:
        raise ConfigError(
            f"{at('resilience.grace_s')}: {job.grace_s:g} s to save do not fit into the last "
            f"{profile.slurm.signal_s} s of an attempt ({named}: slurm.signal_s); lower it, or "
            "raise signal_s"
        )


def quoted(words: str | Iterable[str]) -> str:
    """One word, or several, as a shell reads them back."""
    return shlex.quote(words) if isinstance(words, str) else shlex.join(words)


def fill(template: str, job: ClusterJob, **values: Any) -> str:
    """A job as one of ``templates/``; every value that a shell reads goes through ``q``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # these are shell scripts, not HTML
    )
    environment.filters["q"] = quoted
    text = environment.get_template(template).render(job=job, prelude=prelude(job), **values)
    return text.lstrip("\n")


def hand_over(command: Sequence[str], text: str) -> str:
    """Give what was rendered to a scheduler's own command; returns what that prints.

    Raises ConfigError when the command is not here, SchedulerError with its own words.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(
            f"{command[0]}: no such command; run this where it is, or take --dry-run's output there"
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise SchedulerError(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def need_secrets(job: ClusterJob) -> None:
    """Refuse to submit without the secrets that travel with this environment."""
    if missing := [name for name in job.profile.secrets if not os.environ.get(name)]:
        raise ConfigError(f"secrets: {', '.join(missing)} not in the environment; export them")


def prelude(job: ClusterJob) -> str:
    """Lines of shell that every target begins with: variables, secrets by name, the user's own."""
    variables = {
        **job.profile.env,
        "PET_SIGNALS_TO_HANDLE": SIGNALS,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(job.patience_s),
    }
    lines = [f"export {name}={quoted(value)}" for name, value in variables.items()]
    missing = "a secret that the profile names, is not in the environment"
    lines += [f': "${{{name}:?{missing}}}"' for name in job.profile.secrets]
    return "\n".join([*lines, *job.profile.setup])
