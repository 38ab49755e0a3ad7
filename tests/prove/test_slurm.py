"""`shardwise launch slurm` against a real Slurm of two nodes, as it is submitted.

Whatever happens to a job, its run ends as one that nothing happened to: the same files of weights
and optimizer, and the same loss, gradient and samples at every step.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.resilience import attempts
from tests.cli.conftest import write_recipe
from tests.support import slurm
from tests.support.slurm import SlurmCluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 300
SAVES = ("resilience.grace_s=20", "stages.0.checkpoint.every=20")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
PROFILE = """\
shared: {folder}
workdir: {folder}
python: {python}
cpu_ranks: 1
env: {{OMP_NUM_THREADS: "1", PYTHONPATH: {root}}}
preflight: {preflight}
slurm: {{partition: {partition}, time: "30"}}
"""


class Site:
    """A folder that all nodes share, with a recipe, and the cluster."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.recipe = write_recipe(folder, STEPS)

    def launch(
        self,
        name: str,
        *overrides: str,
        partition: str = "low",
        preflight: bool = False,
        python: str = sys.executable,
    ) -> str:
        """Submit the recipe as run ``name``; the job's number."""
        profile = self.folder / f"{name}.profile.yaml"
        profile.write_text(
            PROFILE.format(
                folder=self.folder,
                python=python,
                root=ROOT,
                preflight=str(preflight).lower(),
                partition=partition,
            )
        )
        told = self.folder / f"{name}.json"
        words = [f"run_dir={self.run(name)}", *SAVES, *overrides]
        options = ["--nodes", "2", "--profile", str(profile), "--json", str(told)]
        command = [sys.executable, "-m", "shardwise", "launch", "slurm", str(self.recipe)]
        self.cluster.call(*command, *words, *options, cwd=self.folder)
        return str(json.loads(told.read_text())["job"])

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def ended(self, job: str, seconds: float = 400) -> dict[str, str]:
        """The job once it has ended for good."""
        self.cluster.until(
            lambda: self.cluster.job(job).get("JobState") in ENDED, seconds, f"job {job} ends"
        )
        return self.cluster.job(job)

    def restarted(self, job: str, times: int = 1) -> None:
        """Wait until a job has been requeued."""
        done = lambda: int(self.cluster.job(job).get("Restarts", 0)) >= times  # noqa: E731
        self.cluster.until(done, 200, f"job {job} is requeued")

    def reached(self, name: str, step: int) -> None:
        """Wait until a run has done a step."""
        self.cluster.until(lambda: len(steps(self.run(name))) >= step, 300, f"{name}: step {step}")

    def log(self, job: str) -> str:
        [file] = (self.folder / "shardwise-logs").glob(f"*-{job}.log")
        return file.read_text()

    def same(self, name: str) -> None:
        """A run ended as the unbroken one."""
        assert final(self.run(name)) == final(self.run("unbroken"))


def steps(run: Path) -> list[tuple[Any, ...]]:
    """Step, loss, gradient, tokens and samples of every update, as logged."""
    file = run / "metrics.jsonl"
    rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    keys = ("step", "loss", "grad_norm", "tokens", "samples")
    return [tuple(row[k] for k in keys) for row in rows if row["kind"] == "train"]


def final(run: Path) -> tuple[Any, ...]:
    """What a run leaves: hashes of its last checkpoint's shards, and its steps, each once."""
    folder = run / "stages" / "pretrain" / "checkpoints" / f"step_{STEPS:08d}"
    book = json.loads((folder / "manifest.json").read_text())["files"]
    shards = {name: about["xxh3_128"] for name, about in book.items() if name.startswith("shard")}
    assert len(shards) == 2 and [row[0] for row in steps(run)] == [*range(1, STEPS + 1)]
    return shards, steps(run)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if why := slurm.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm")
    cluster = SlurmCluster(folder / "slurm")
    try:
        try:
            cluster.start()
        except RuntimeError as error:
            if "Operation not permitted" in str(error):
                pytest.skip(f"network namespaces are not permitted here: {error}")
            raise
        (folder / "shared").mkdir()
        site = Site(cluster, folder / "shared")
        job = site.launch("unbroken", preflight=True)
        assert site.ended(job)["JobState"] == "COMPLETED", site.log(job)
        yield site
    finally:
        cluster.stop()


def test_submitted_and_done(site: Site) -> None:
    [attempt] = attempts.read(site.run("unbroken"))
    assert (attempt.exit_code, attempt.hosts, attempt.world) == (0, ("n1", "n2"), 2)
    log = site.log(attempt.job.split(".")[0])
    assert log.index("\nready\n") < log.index("done: done")
    status = [sys.executable, "-m", "shardwise", "launch", "status", str(site.run("unbroken"))]
    assert "done" in site.cluster.call(*status).stdout


def test_preempted_by_a_partition_of_higher_priority(site: Site) -> None:
    low = site.launch("preempted")
    site.reached("preempted", 30)
    other = site.launch("other", f"stages.0.steps={STEPS // 10}", partition="high")
    site.restarted(low)
    assert site.ended(other)["JobState"] == "COMPLETED"
    assert site.ended(low)["JobState"] == "COMPLETED", site.log(low)
    first, second = attempts.read(site.run("preempted"))
    assert first.exit_code == 85 and first.reached == second.start  # saved, and lost no step
    site.same("preempted")


def test_saved_before_its_time_is_over(site: Site) -> None:
    """USR1 to the steps is what --signal sends."""
    job = site.launch("signalled")
    site.reached("signalled", 30)
    site.cluster.call("scancel", "--signal=USR1", job)
    assert site.ended(job)["JobState"] == "COMPLETED", site.log(job)
    first, second = attempts.read(site.run("signalled"))
    assert first.exit_code == 85 and first.reached == second.start
    assert (first.job, second.job) == (f"{job}.0", f"{job}.1")
    site.same("signalled")


def test_a_lost_node(site: Site) -> None:
    job = site.launch("node-down", preflight=True)
    site.reached("node-down", 50)
    site.cluster.crash("n2")
    site.restarted(job)
    site.cluster.plug("n2")
    site.cluster.boot("n2")
    assert site.ended(job)["JobState"] == "COMPLETED", site.log(job)
    assert len(attempts.read(site.run("node-down"))) == 2
    site.same("node-down")


def test_a_killed_rank(site: Site) -> None:
    job = site.launch("killed")
    site.reached("killed", 50)
    ranks = [pid for pid in site.cluster.pids("n2") if _is_rank(pid)]
    assert len(ranks) == 1
    os.kill(ranks[0], signal.SIGKILL)
    assert site.ended(job)["JobState"] == "COMPLETED", site.log(job)
    first, second = attempts.read(site.run("killed"))
    assert first.exit_code not in (0, 85) and second.start["pretrain"] >= 40
    site.same("killed")


def _is_rank(pid: int) -> bool:
    """Not the agent, which has no rank."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"RANK=1" in environment and b"shardwise\0train" in command


def test_divergence_is_not_requeued(site: Site) -> None:
    job = site.launch("diverged", "stages.0.optimizer.lr=1e6")
    ended = site.ended(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "3:0")
    [attempt] = attempts.read(site.run("diverged"))
    assert attempt.exit_code == 3 and "stop: diverged" in site.log(job)


@pytest.mark.parametrize("preflight", [True, False])
def test_bad_input_is_not_requeued(site: Site, preflight: bool) -> None:
    """What was right when it was submitted, and is not when the job begins."""
    name = f"bad-input-{preflight}"
    update = ["scontrol", "update", "PartitionName=low"]
    site.cluster.call(*update, "State=DOWN")
    data = site.folder / "train.txt"
    kept = data.read_text()
    try:
        job = site.launch(name, preflight=preflight)
        data.unlink()
        site.cluster.call(*update, "State=UP")
        ended = site.ended(job)
    finally:
        data.write_text(kept)
        site.cluster.call(*update, "State=UP")
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0")
    [attempt] = attempts.read(site.run(name))
    assert attempt.exit_code == 2 and "train.txt" in attempt.reason


def test_three_attempts_without_progress_stop(site: Site) -> None:
    crash = site.folder / "crash.sh"
    crash.write_text(
        '#!/bin/sh\ncase "$*" in *" shardwise train "*) kill -SEGV $$ ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    crash.chmod(0o755)
    job = site.launch("crashing", python=str(crash))
    ended = site.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2")
    known = attempts.read(site.run("crashing"))
    assert len(known) == 3 and not any(a.reached for a in known)
    assert "3 attempts in a row" in site.log(job)


def test_an_array_of_runs(site: Site) -> None:
    """One preempted half-way, as sweeps submit them."""
    runs = [str(site.run(name)) for name in ("array-0", "array-1")]
    words = [(str(site.recipe), f"run_dir={run}", *SAVES) for run in runs]
    script = f"""\
from pathlib import Path
from shardwise.launch import slurm
from shardwise.launch.cluster import Task, prepare
from shardwise.launch.profile import load_profile
profile = load_profile(Path("unbroken.profile.yaml"))
words = {words!r}
job = prepare("slurm", words[0][0], words[0][1:], 2, profile)
tasks = [Task(*task) for task in zip({runs!r}, words)]
print(slurm.submit(job, slurm.render(job, tasks, at_once=1)))
"""
    told = site.cluster.call(sys.executable, "-c", script, cwd=site.folder)
    job = told.stdout.split()[-1]
    site.reached("array-0", 30)
    site.cluster.call("scancel", "--signal=USR1", f"{job}_0")
    for task in ("0", "1"):
        assert site.ended(f"{job}_{task}")["JobState"] == "COMPLETED", told.stdout
        site.same(f"array-{task}")
    assert [len(attempts.read(site.run(f"array-{t}"))) for t in "01"] == [2, 1]
