"""sbatch, srun, scontrol and sinfo for a machine without Slurm, by the name they are called.

They keep what they are told in ``$FAKE_SLURM``; `Cluster` runs the batch scripts as slurmctld
would: it sets the variables of a job, gives signals to the tasks, and starts again what asks for
it. It knows one job at a time.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = "FAKE_SLURM"
NAMES = ("sbatch", "srun", "scontrol", "sinfo")


class Cluster:
    """The commands in a folder for PATH, and what was submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in NAMES:
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
            script.chmod(0o755)
        self.variables = {
            FOLDER: str(folder),
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "n[1-2]",
        }

    @property
    def script(self) -> Path:
        """What sbatch was given."""
        return self.folder / "job.sh"

    def start(self, restarts: int = 0, **variables: str) -> subprocess.Popen[str]:
        """A turn of the job."""
        (self.folder / "requeue").unlink(missing_ok=True)
        (self.folder / "tasks").unlink(missing_ok=True)
        options = self.options()
        given = {**os.environ, **self.variables, **variables}
        for name in ("RANK", "WORLD_SIZE"):
            given.pop(name, None)
        if restarts:
            given["SLURM_RESTART_COUNT"] = str(restarts)
        if "cpus-per-task" in options:
            given["SLURM_CPUS_PER_TASK"] = options["cpus-per-task"]
        return subprocess.Popen(
            ["/bin/sh", str(self.script)], env=given, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """To every process of every task, as slurmd does."""
        for task in (self.folder / "tasks").read_text().split():
            os.killpg(int(task), number)

    @property
    def requeued(self) -> bool:
        """Whether the job's own script asked for another turn."""
        return (self.folder / "requeue").exists()

    def options(self) -> dict[str, str]:
        """The lines of the script that sbatch reads."""
        lines = [line for line in self.script.read_text().splitlines() if line[:8] == "#SBATCH "]
        words = [shlex.split(line)[1].removeprefix("--").partition("=") for line in lines]
        return {key: value for key, _, value in words}


def _srun(words: list[str], folder: Path) -> int:
    flags = [word for word in words[: _first(words)] if word.startswith("--")]
    command = words[len(flags) :]
    number = next((int(f.partition("=")[2]) for f in flags if f.startswith("--ntasks=")), 1)
    tasks = [
        subprocess.Popen(command, env={**os.environ, "SLURM_NODEID": str(n)}, process_group=0)
        for n in range(number)
    ]
    with (folder / "tasks").open("a") as file:
        file.writelines(f"{task.pid}\n" for task in tasks)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def _first(words: list[str]) -> int:
    return next(i for i, word in enumerate(words) if not word.startswith("--"))


def _main(name: str, words: list[str]) -> int:
    folder = Path(os.environ[FOLDER])
    if name == "sbatch":
        (folder / "job.sh").write_text(sys.stdin.read())
        print("4711;fake")
    elif name == "srun":
        return _srun(words, folder)
    elif words[:2] == ["show", "hostnames"]:
        print("localhost" if "[" in words[2] else words[2])
    elif words[:1] == ["requeue"]:
        (folder / "requeue").write_text(f"{words[1]} {time.time()}")
    elif name == "sinfo" and (nodes := folder / "nodes").exists():
        rows = [row.split("|") for row in nodes.read_text().splitlines()]
        asked = words[words.index("--partition") + 1] if "--partition" in words else ""
        rows = [row for row in rows if asked in ("", row[0].removesuffix("*"))]
        if words[-1] == "%R":
            print("\n".join(dict.fromkeys(row[0].removesuffix("*") for row in rows)))
        elif rows:
            print("\n".join("|".join(row) for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2:]))
