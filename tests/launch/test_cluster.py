"""What is refused before anything is submitted, and what a profile says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardwise.launch import profile as room
from shardwise.launch import slurm
from shardwise.launch.cluster import prepare
from shardwise.launch.profile import load_profile
from tests.cli.conftest import Command, shardwise, write_recipe  # noqa: F401  # a fixture
from tests.launch.fake_slurm import Cluster
from tests.launch.test_slurm import cluster, write_profile  # noqa: F401  # a fixture


@pytest.mark.parametrize(
    ("words", "edit", "message"),
    [
        (["--nodes", 3, "engine.layout=tp2"], None, "launch starts 3 ranks: --nodes 3 x 1"),
        (["--nodes", 0], None, "--nodes 0: from 1"),
        (["--nodes", 9], ("partition: low", "max_nodes: 4"), "from 1 to 4 (PROFILE: slurm.max_n"),
        (["engine.layout=dp3"], None, "launch starts 2 ranks: --nodes 2 x 1 a node"),
        (["engine.layout=tp4"], ("cpu_ranks: 1", "cpu_ranks: 3"), "starts 6 ranks: --nodes 2 x 3"),
        (["run_dir=/elsewhere/run"], None, "run_dir (command line override 1): /elsewhere/run is"),
        (["engine.device=cuda"], None, "engine.device (command line override 1): cuda, but"),
        (["engine.device=cpu"], ("cpu_ranks", "gpus"), "would leave the GPUs of PROFILE idle"),
        ([], ("1:00:00", "4:59"), "slurm.time (PROFILE:6): leaves nothing before slurm.signal_s"),
        (["resilience.grace_s=290"], None, "290 s to save do not fit into the last 300 s"),
        (["name=hf_abcdefghijklmnop1234"], None, "override 1 (name=<redacted>): holds what looks"),
        (["seed=\x1b1"], None, "override 1: holds a control character"),
        (["stages.0.data.sources.0.path=gone.txt"], None, "gone.txt: no such file"),
        ([], ("partition: low", "partitoin: low"), "slurm.partitoin (PROFILE:6): unknown key; did"),
        ([], ("partition: low", "partition: 'a b'"), "slurm.partition (PROFILE:6): given 'a b'"),
        ([], ("cpu_ranks: 1", "cpu_ranks: 1\ngpus: 8"), "gpus, or cpu_ranks, and not both"),
        ([], ("lo,", "hf_abcdefghijklmnop1234,"), "env (PROFILE:4): holds what looks like a sec"),
        ([], ("slurm: {partition: low, time: \"1:00:00\"}", ""), "which scheduler is it?"),
        ([], ("env: {", "env: {A: \"b\\nc\", "), "env.A (PROFILE:4): holds a line break"),
        ([], ("preflight", "image: x.sif\npreflight"), "image and slurm.container go together"),
    ],
)  # fmt: skip
def test_refused(
    words: list[object],
    edit: tuple[str, str] | None,
    message: str,
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
    shardwise: Command,  # noqa: F811
) -> None:
    recipe = write_recipe(tmp_path)
    profile = write_profile(tmp_path, *([edit] if edit else []))
    nodes = [] if "--nodes" in words else ["--nodes", 2]
    code, _, err = shardwise("launch", "slurm", recipe, *words, *nodes)
    assert code == 2, err
    err = err.replace(str(profile), "PROFILE")
    assert any(part in err for part in message.split("|")), err
    assert not cluster.script.exists() and not (tmp_path / "run").exists()


def test_no_profile_and_no_section(tmp_path: Path, shardwise: Command) -> None:  # noqa: F811
    code, _, err = shardwise("launch", "slurm", write_recipe(tmp_path))
    assert code == 2 and "which cluster? Give --profile" in err
    profile = write_profile(tmp_path)
    code, _, err = shardwise("launch", "kubernetes", tmp_path / "tiny.yaml", "--profile", profile)
    assert code == 2 and "has no section kubernetes" in err


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("2-1", 176400), ("1-0:10:05", 87005)],
)
def test_times_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    assert room._seconds(time) == seconds


def test_every_key_of_a_profile_is_described() -> None:
    sections = (
        room.ClusterProfile, room.SlurmProfile, room.KubernetesProfile, room.SkyPilotProfile,
    )  # fmt: skip
    fields = [field for section in sections for field in section.model_fields.items()]
    assert [name for name, field in fields if not field.description] == []


@pytest.mark.parametrize(
    ("rows", "choice", "message"),
    [
        ("low|n1|64|gpu:8|a\nlow|n2|64|gpu:8|a", "", ""),
        ("low|n1|64|gpu:8|a\nlow|n2|64|gpu:4|b", "", "its nodes differ"),
        ("low|n1|64|gpu:8|a\nlow|n2|64|gpu:4|b\nlow|n3|64|gpu:8|a", "constraint: a", ""),
        ("low|n1|64|gpu:8|a\nlow|n2|64|gpu:4|b\nlow|n3|64|gpu:8|a", "exclude: n2", ""),
        ("low|n1|64|gpu:8|a\nlow|n2|64|gpu:4|b", "constraint: a", "has 1 such node"),
        ("low|n1|64|gpu:8|a", "", "has 1 such node"),
        ("gpu|n1|64|gpu:8|a\ncpu|n2|9||a", "", "there is no low; known: gpu, cpu"),
        ("low*|n1|9||a\nlow*|n2|9||a\nhigh|n3|8||b", "partition: null", ""),
    ],
)
def test_nodes_that_differ_are_refused(
    rows: str,
    choice: str,
    message: str,
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
    shardwise: Command,  # noqa: F811
) -> None:
    (cluster.folder / "nodes").write_text(rows)
    if choice:
        words = choice if "partition" in choice else f"partition: low, {choice}"
        write_profile(tmp_path, ("partition: low", words))
    code, _, err = shardwise("launch", "slurm", write_recipe(tmp_path), "--nodes", 2)
    assert (code, cluster.script.exists()) == ((2, False) if message else (0, True)), err
    assert message in err


def test_secrets_must_be_there(
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
    shardwise: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_profile(tmp_path, ("preflight", "secrets: [HF_TOKEN]\npreflight"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, _, err = shardwise("launch", "slurm", recipe := write_recipe(tmp_path))
    assert code == 2 and "secrets: HF_TOKEN not in the environment" in err
    assert not cluster.script.exists()
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    assert shardwise("launch", "slurm", recipe)[0] == 0
    assert "abcdefghijklmnop" not in cluster.script.read_text()


def test_profile_check_says_what_is_missing(
    cluster: Cluster,  # noqa: F811
    tmp_path: Path,
    shardwise: Command,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, out, _ = shardwise("launch", "profile", "check")
    assert code == 0 and "nothing is missing" in out
    (cluster.folder / "nodes").write_text("low|n1|64|gpu:8|a\nlow|n2|64|gpu:4|b")
    code, _, err = shardwise("launch", "profile", "check")
    assert code == 1 and "its nodes differ" in err
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write_profile(
        tmp_path,
        ("preflight", "secrets: [WANDB_API_KEY]\nworkdir: /none\npreflight"),
        (", time: \"1:00:00\"", ""),
    )  # fmt: skip
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, err = shardwise("launch", "profile", "check")
    assert code == 1
    for part in ("WANDB_API_KEY", "no command sbatch", "workdir: /none", "slurm.time"):
        assert part in err


def test_an_array_has_a_line_a_run(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Each task is the same script with words and a folder of its own."""
    profile = load_profile(write_profile(tmp_path))
    job = prepare("slurm", write_recipe(tmp_path), ["seed=1"], 1, profile)
    tasks = [slurm.Task(f"{tmp_path}/t/{i}", ("no.yaml", f"name=it's {i}")) for i in range(3)]
    cluster.script.write_text(slurm.render(job, tasks, at_once=2))
    assert cluster.options()["array"] == "0-2%2"
    stub = cluster.folder / "srun"
    stub.write_text('#!/bin/sh\nwhile [ "$1" != train ]; do shift; done\nprintf "<%s>" "$@"\n')
    done = cluster.start(SLURM_ARRAY_TASK_ID="1")
    printed, _ = done.communicate()
    assert printed.startswith("<train><no.yaml><name=it's 1>"), printed
    assert (tmp_path / "t" / "1" / "attempts.jsonl").exists()
    done = cluster.start(SLURM_ARRAY_TASK_ID="3")
    assert "there are 3" in done.communicate()[0] and done.returncode == 2
