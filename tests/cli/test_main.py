"""Commands, exit codes, one-line errors."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shardwise as package
from shardwise.cli.main import main
from shardwise.errors import UserError
from tests.cli.conftest import Command, write_recipe

COMMANDS = ["train", "init", "generate", "evaluate", "convert", "report", "doctor", "schema"]
GROUPS = ["checkpoint", "data", "launch"]


def test_help_lists_the_commands(shardwise: Command) -> None:
    code, out, _ = shardwise("--help")
    assert code == 0
    for command in COMMANDS + GROUPS:
        assert command in out
    for args, subcommands in (
        (["checkpoint"], ["inspect", "verify", "diff"]),
        (["data"], ["prepare", "inspect"]),
        (["launch"], ["local"]),
    ):
        code, out, _ = shardwise(*args, "--help")
        assert code == 0
        assert all(name in out for name in subcommands)


def test_public_functions_are_where_the_front_page_says() -> None:
    for name in package._PUBLIC:
        assert callable(getattr(package, name)), name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="traim"):
        package.traim  # noqa: B018


@pytest.mark.parametrize(
    "args", [["traim"], ["train"], ["train", "x.yaml", "--nproc", "0"], ["checkpoint", "verify"]]
)
def test_bad_usage_is_2(shardwise: Command, args: list[str]) -> None:
    code, _, err = shardwise(*args)
    assert code == 2
    assert "Traceback" not in err


def test_a_bad_recipe_is_one_message_and_starts_nothing(shardwise: Command, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    code, out, err = shardwise("train", path, "stages.pretrain.stepz=3", "--nproc", 2)
    assert code == 2 and out == ""
    assert err == (
        "error: "
        f"{path}: stages.0.stepz (command line override 1): unknown key; did you mean 'steps'? "
        + err.split("did you mean 'steps'? ")[1]
    )
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    code, _, err = shardwise("--debug", "train", path, "stages.pretrain.stepz=3")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize(
    "override",
    [
        "engine.layout=dp3",
        "engine.layout=nonsense",
        "stages.0.batch.seq_len=65",
        "init_from=nowhere",
    ],
)
def test_what_cannot_be_combined_starts_nothing(
    shardwise: Command, tmp_path: Path, override: str
) -> None:
    code, _, err = shardwise("train", write_recipe(tmp_path), override, "--nproc", 2)
    assert code == 2, err
    assert "Traceback" not in err and override.split("=")[1] in err
    assert not (tmp_path / "run").exists()


def test_print_config(shardwise: Command, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    code, out, _ = shardwise("train", path, "seed=9", "--print-config")
    assert code == 0
    assert any(
        line.split() == ["seed", "=", "9", "#", "command", "line", "override", "1"]
        for line in out.splitlines()
    )
    code, out, _ = shardwise("train", path, "--print-config", "--json", "-")
    assert json.loads(out)["stages.0.steps"] == {"value": 2, "source": f"{path}:14"}
    assert not (tmp_path / "run").exists()


def test_ranks_do_not_start_ranks(
    shardwise: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = shardwise("train", write_recipe(tmp_path), "--nproc", 2)
    assert code == 2 and "torchrun has started 4 ranks already" in err


def test_a_bug_is_70_with_its_traceback(
    shardwise: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise KeyError("oops")

    monkeypatch.setattr("shardwise.launch.doctor.doctor", broken)
    code, _, err = shardwise("doctor")
    assert code == 70 and "KeyError: 'oops'" in err and "bug in shardwise" in err


def test_a_lost_rank_is_no_bug(shardwise: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]:27")

    monkeypatch.setattr("shardwise.launch.doctor.doctor", broken)
    monkeypatch.setenv("RANK", "1")
    code, _, err = shardwise("doctor")
    assert code == 1 and "rank 1: lost another rank" in err and "bug in" not in err


def test_a_file_that_cannot_be_used_is_no_bug(
    shardwise: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        (tmp_path / "nowhere").read_text()

    monkeypatch.setattr("shardwise.launch.doctor.doctor", broken)
    code, _, err = shardwise("doctor")
    assert (code, err) == (2, f"error: {tmp_path / 'nowhere'}: No such file or directory\n")
    assert "Traceback" in shardwise("--debug", "doctor")[2]

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shardwise.launch.doctor.doctor", full)
    code, _, err = shardwise("doctor")
    assert code == 1 and "disk full; free some space" in err


@pytest.mark.parametrize("kind", [KeyError, UserError, OSError])
def test_complaints_hold_no_secret(
    shardwise: Command, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setenv("MY_API_KEY", "very-secret-value")

    def broken() -> None:
        raise kind("at https://me:very-secret-value@example.org")

    monkeypatch.setattr("shardwise.launch.doctor.doctor", broken)
    _, _, err = shardwise("--debug", "doctor")
    assert "Traceback" in err and "<redacted>" in err and "very-secret" not in err


def test_verify_shows_no_table_when_nothing_is_compared(shardwise: Command, tmp_path: Path) -> None:
    code, out, err = shardwise("verify", write_recipe(tmp_path), "--stage", "nothing")
    assert (code, out) == (2, "") and "nothing" in err


def test_launch_dry_run_says_what_would_start(shardwise: Command, tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    code, out, err = shardwise("launch", "local", path, "--nproc", 2, "--dry-run", "--json", "-")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["nproc"] == 2 and plan["environment"]["WORLD_SIZE"] == "2"
    assert [stage["name"] for stage in plan["stages"]] == ["pretrain"]
    assert not (tmp_path / "run").exists()
    assert shardwise("launch", "local", path, "engine.layout=dp3", "--dry-run")[0] == 2


def test_doctor(shardwise: Command) -> None:
    code, out, _ = shardwise("doctor", "--json", "-")
    found = json.loads(out)
    assert code == 0
    assert found["torch"]["version"] and found["machine"]["cores"] >= 1
    libraries = {row["name"]: row for row in found["libraries"]}
    assert {"flash_attn", "apex", "gguf", "wandb"} <= set(libraries)
    assert all(row["detail"] for row in libraries.values())
    code, out, _ = shardwise("doctor")
    assert all(name in out for name in libraries)


def test_schema_is_json(shardwise: Command) -> None:
    code, out, _ = shardwise("schema")
    *families, _ = json.loads(out)["properties"]["model"]["oneOf"]
    assert code == 0
    assert {"llama", "gpt2"} <= {f["properties"]["family"]["const"] for f in families}


def test_json_file_that_cannot_be_written(shardwise: Command, tmp_path: Path) -> None:
    code, _, err = shardwise("doctor", "--json", tmp_path / "no" / "x.json")
    assert code == 2 and "cannot be written" in err


def test_module_entry_point(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shardwise", "train", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        env={**os.environ},
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'none.yaml'}: no such file")


def test_ranks_speak_once_of_a_bad_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys, "argv", ["shardwise", "train", "nowhere.yaml"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err == ""
