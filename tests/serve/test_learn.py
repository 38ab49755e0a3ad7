"""From a log to an adapter that is served, or is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import shardwise
from shardwise.adapters.peft import WEIGHTS
from shardwise.errors import DataError, UserError
from shardwise.serve import learn as learning
from shardwise.serve import versions
from shardwise.serve.gate import Bounds
from shardwise.serve.learn import Training
from shardwise.storage.lock import LockedError, RunLock
from tests.cli.conftest import Command
from tests.cli.conftest import shardwise as command  # noqa: F401  # a fixture
from tests.serve import trained
from tests.serve.support import running, until, write_model
from tests.support.daily import daily

QUICK = Training(epochs=1.0, batch=16, lr=1e-2, rank=4)
LOOSE = Bounds(max_forgetting=1.0)
SKY = [{"prompt": f"sky {i}?", "correction": "blue"} for i in range(40)]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    file = tmp_path / "probe.txt"
    file.write_text("the quick brown fox. " * 4)
    return file


def learn(log: Path, ckpt: Path, out: Path, probe: Path, **changes: Any) -> dict[str, Any]:
    said = {"training": QUICK, "bounds": LOOSE, "probe_texts": [probe]} | changes
    return shardwise.learn(log, ckpt, out, **said)


def test_a_log_becomes_a_version_that_is_served(ckpt: Path, tmp_path: Path, probe: Path) -> None:
    log, out = trained.write_log(tmp_path / "log", SKY), tmp_path / "out"
    out.mkdir()
    with running(ckpt, adapters={"own": out}) as served:
        base = served.engine("own").checksum
        done = learn(log, ckpt, out, probe)
        assert done["accepted"] and done["reasons"] == []
        assert done["fed_back"]["after"]["bits"] < done["fed_back"]["before"]["bits"]
        until(lambda: served.engine("own").checksum != base)
    lineage = versions.read_lineage(Path(done["folder"]))
    assert lineage["parent"] is None and len(lineage["learned"]) > 20
    assert versions.current(out) == done["version"]
    assert not (out / "work").exists()
    # Nothing new: nothing is done. Then more comes in, and the version is its parent.
    assert learn(log, ckpt, out, probe)["version"] is None
    more = trained.write_log(tmp_path / "more", [
        *SKY, *({"prompt": f"sea {i}?", "correction": "deep"} for i in range(20))
    ])  # fmt: skip
    again = learn(more, ckpt, out, probe, training=Training(("sft", "kto"), 0.5, 16, 1e-2, 4))
    assert again["parent"] == done["version"] != again["version"]
    assert again["fed_back"]["before"]["bits"] != done["fed_back"]["after"]["bits"]


PLACES = daily(["train", "convert", "measure", "commit", "pointer", "clean"], 1, 3)


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_at_any_moment_comes_to_the_same_bits(
    ckpt: Path, tmp_path: Path, probe: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    rows = SKY[:36]
    log = trained.write_log(tmp_path / "log", rows)
    whole = learn(log, ckpt, tmp_path / "whole", probe)

    def die(*said: Any, **more: Any) -> Any:
        if place != "clean" or versions.current(tmp_path / "cut"):
            raise KilledError
        return shutil_rmtree(*said, **more)

    shutil_rmtree = shutil.rmtree

    target, name = {
        "train": (learning, "train"),
        "convert": (learning, "convert"),
        "measure": (learning.measure, "probe"),
        "commit": (versions, "sync_tree"),
        "pointer": (versions, "point"),
        "clean": (learning.shutil, "rmtree"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, die)
        with pytest.raises(KilledError):
            learn(log, ckpt, tmp_path / "cut", probe)
    if place not in ("pointer", "clean"):  # the log goes on, and the plan is of its beginning
        with log.open("a") as stream:
            stream.write(trained.record("late", {"prompt": "late?", "correction": "x"}))
    done = learn(log, ckpt, tmp_path / "cut", probe)
    assert done["version"] == whole["version"] == versions.current(tmp_path / "cut")
    one, two = (Path(d["folder"]) / WEIGHTS for d in (whole, done))
    assert one.read_bytes() == two.read_bytes()
    assert not (tmp_path / "cut" / "work").exists()


def test_what_the_gate_refuses_is_kept_aside(ckpt: Path, tmp_path: Path, probe: Path) -> None:
    log, out = trained.write_log(tmp_path / "log", SKY), tmp_path / "out"
    strict = {"bounds": Bounds(min_lift=0.9, max_forgetting=1.0)}
    done = learn(log, ckpt, out, probe, **strict)
    assert not done["accepted"] and "must rise by 0.9" in done["reasons"][0]
    assert versions.current(out) is None and Path(done["folder"]).parent == out / "refused"
    assert learn(log, ckpt, out, probe, **strict) == done  # the same again
    kept = versions.read_lineage(Path(done["folder"]))
    assert kept["reasons"] == done["reasons"] and not kept["accepted"]


def test_what_cannot_be_learned_from_is_said(ckpt: Path, tmp_path: Path, probe: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no such log"):
        learn(tmp_path / "none", ckpt, out, probe)
    (tmp_path / "text").write_text("hello\n")
    with pytest.raises(DataError, match="line 1: no log of shardwise serve"):
        learn(tmp_path / "text", ckpt, out, probe)
    few = trained.write_log(tmp_path / "few", SKY[:6])
    with pytest.raises(UserError, match="the gate needs 8"):
        learn(few, ckpt, out, probe)
    bad = trained.write_log(tmp_path / "bad", [{"prompt": "x", "rating": -1}])
    with pytest.raises(UserError, match="none of them for sft"):
        learn(bad, ckpt, out, probe)
    forged = trained.write_log(tmp_path / "forged", [
        {"prompt": f"{i}", "correction": "<|im_end|>x"} for i in range(40)
    ])  # fmt: skip
    with pytest.raises(UserError, match="control tokens"):
        learn(forged, ckpt, out, probe)
    assert not (out / "versions").exists()


def test_one_learner_a_folder(ckpt: Path, tmp_path: Path, probe: Path) -> None:
    log, out = trained.write_log(tmp_path / "log", SKY), tmp_path / "out"
    with RunLock(out), pytest.raises(LockedError):
        learn(log, ckpt, out, probe)


def test_the_commands(command: Command, tmp_path: Path, ckpt: Path) -> None:  # noqa: F811
    (tmp_path / "log").write_text("no log\n")
    asked = ["learn", str(tmp_path / "log"), "--ckpt", str(ckpt), "--adapter", str(tmp_path / "o")]
    code, _, err = command(*asked)
    assert code == 2 and "line 1: no log of shardwise serve" in err
    code, _, err = command(*asked, "--method", "magic")
    assert code == 2 and "allowed: sft, dpo, kto" in err
    with running(ckpt) as served:
        code, _, err = command("serve", str(ckpt), "--port", str(served.port))
    assert code == 2 and f"port {served.port} of 127.0.0.1: in use" in err
    code, _, err = command("serve", str(ckpt), "--host", "0.0.0.0", "--port", "0")
    assert code == 2 and "clients need a token" in err
    for name in ("../x", "base", "", "a/b", "x" * 65):
        code, _, err = command("serve", str(ckpt), "--port", "0", "--adapter", f"{name}={tmp_path}")
        assert code == 2 and "--adapter" in err
    code, _, err = command("serve", str(ckpt), "--port", "0", "--adapter", f"a={tmp_path}/none")
    assert code == 2 and "is no folder" in err


def test_pairs_are_learned_from_too(ckpt: Path, tmp_path: Path, probe: Path) -> None:
    rows = [{**row, "answer": "a cloud"} for row in SKY]
    log = trained.write_log(tmp_path / "log", rows)
    training = Training(("dpo",), 1.0, 16, 1e-2, 4)
    bounds = Bounds(min_lift=-1.0, max_forgetting=9.0)
    done = learn(log, ckpt, tmp_path / "out", probe, training=training, bounds=bounds)
    assert done["fed_back"]["after"]["bits"] != done["fed_back"]["before"]["bits"]


# ----- for real -----


@pytest.mark.slow
def test_poison_in_agreement_is_stopped_by_the_gate(tmp_path: Path) -> None:
    """Many clients, one wrong answer to an earlier stage's tasks, nobody against it."""
    rows = [
        {**row, "correction": "9", "client": f"evil{i}"}
        for i, row in enumerate(trained.corrections(60))
        if row["prompt"].startswith("Count")
    ]
    out, training = tmp_path / "out", Training(epochs=12.0, batch=16, lr=1e-2, rank=8)
    log = trained.write_log(tmp_path / "log", rows)
    done = shardwise.learn(log, trained.model(), out, training=training)
    assert done["fed_back"]["after"]["accuracy"] > 0.9  # it was learned, by its own measure
    assert not done["accepted"] and versions.current(out) is None
    assert any(reason.startswith("forgetting: accuracy") for reason in done["reasons"])
