"""Which layouts are tried, and what is said of those that cannot be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.verify.run import verify
from shardwise.verify.verdict import Verdict
from shardwise.verify.verifier import Verifier
from shardwise.verify.walk import Task, Walked
from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture
from tests.stages.recipes import recipe
from tests.support.pool import RankPool


@pytest.fixture
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Verifier, stage: str, layout: str, precision: str, _: bool) -> Verdict:
        return Verdict(stage, layout, precision, {}, 0.0)

    def splits(self: Verifier, stage: str, layout: str) -> Verdict:
        return Verdict(stage, "one process", "fp64", {}, 0.0)

    monkeypatch.setattr(Verifier, "check", check)
    monkeypatch.setattr(Verifier, "check_splits", splits)


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_layout_that_cannot_be_does_not_end_the_others(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain", "ppo")
    report = verify(config, ["tp8", "dp2", "dp2.foo", "actor=tp2", "suite"])
    tried = {(v.stage, v.layout) for v in report.verdicts}
    assert {("pretrain", "dp2"), ("ppo", "dp2"), ("ppo", "actor=tp2")} <= tried
    assert ("pretrain", "actor=tp2") not in tried
    assert set(report.impossible) == {"tp8", "dp2.foo", "actor=tp2"}
    assert "does not divide num_heads 4; nearest: engine.layout=" in report.refused["tp8"]
    assert "known: dpN" in report.refused["dp2.foo"]
    assert "stage pretrain: " in report.refused["actor=tp2"]
    assert not report.passed
    of_suite = verify(config, ["suite"], stage="pretrain")
    assert of_suite.refused and of_suite.passed  # nobody asked for those by name


@pytest.mark.usefixtures("nothing_is_computed")
def test_the_exit_code_says_so(
    shardwise: Command,  # noqa: F811
    tmp_path: Path,
) -> None:
    path, result = tmp_path / "recipe.yaml", tmp_path / "result.json"
    junit = tmp_path / "junit.xml"
    path.write_text(json.dumps(recipe(tmp_path / "run", "pretrain")))
    code, out, err = shardwise(
        "verify", path, "-l", "tp8", "-l", "dp2", "--json", result, "--junit", junit
    )
    assert code == 2 and "1 of the layouts asked for cannot be: tp8" in err
    assert "cannot be: tp8: " in out and "3 of 3 compute what one process computes" in out
    found: dict[str, Any] = json.loads(result.read_text())
    assert not found["passed"] and {v["layout"] for v in found["verdicts"]} == {
        "dp2",
        "one process",
    }
    suite = ElementTree.parse(junit).getroot()
    assert [suite.get(k) for k in ("name", "tests", "errors")] == ["recipe", "4", "1"]
    assert shardwise("verify", path, "-l", "dp2")[0] == 0
    code, _, err = shardwise("verify", path, "-l", "dp2", "--junit", tmp_path)
    assert code == 2 and f"--junit {tmp_path}: cannot be written" in err
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml", "result.json", "junit.xml"} | {
        "corpus"
    }


@pytest.mark.usefixtures("nothing_is_computed")
def test_another_engine_is_tried_in_its_own_precisions(tmp_path: Path) -> None:
    config, told = recipe(tmp_path / "run", "pretrain", "ppo"), list[str]()
    report = verify(config, ["dp2.zero2", "tp2"], engine="deepspeed", note=told.append)
    tried = [(v.stage, v.layout, v.precision) for v in report.verdicts if "process" not in v.layout]
    assert tried == [("pretrain", "dp2.zero2", "fp32"), ("ppo", "dp2.zero2", "fp32")]
    assert "no tensor parallelism" in report.refused["tp2"] and report.impossible == ("tp2",)
    assert told == list(report.notes) and "fp32 masters" in told[0]
    report = verify(config, ["tp2"], engine="megatron", stage="pretrain")
    assert {v.precision for v in report.verdicts} == {"fp64", "fp32"} and "shim" in report.notes[0]
    assert verify(config, ["tp2"], stage="pretrain").notes == ()
    with pytest.raises(ConfigError, match="unknown engine horovod; known: deepspeed, megatron"):
        verify(config, ["dp2"], engine="horovod")


@pytest.mark.usefixtures("nothing_is_computed")
def test_a_quantised_batch_is_not_cut_otherwise(tmp_path: Path) -> None:
    """Tokens of a forward pass share scales."""
    config = recipe(tmp_path / "run", "pretrain")
    config["model"] |= {"ffn_size": 64, "num_layers": 3}
    config["engine"] = {"precision": "bf16", "compile": False, "fp8": {"recipe": "current"}}
    report = verify(config, ["dp2"])
    assert [v.layout for v in report.verdicts] == ["dp2", "dp2"]


def test_ranks_compute_on_the_device_and_the_oracle_on_the_cpu(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, str]] = []
    walk = Verifier._walk

    def here(self: Verifier, task: Task) -> list[Walked]:
        asked.append((task.oracle, task.device))
        return walk(self, dataclasses.replace(task, device="cpu"))

    monkeypatch.setattr(Verifier, "_walk", here)
    verifier = Verifier(recipe(tmp_path / "run", "pretrain"), ranks, device="cuda")
    verdict = verifier.check("pretrain", "dp2.zero2")
    verifier.close()
    assert verdict.passed and asked == [(True, "cpu"), (False, "cuda")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        verify(config, ["dp1"], device="cuda")
    with pytest.raises(ConfigError, match="known: cpu, cuda"):
        verify(config, ["dp1"], device="tpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_the_cpu_does(tmp_path: Path) -> None:
    report = verify(recipe(tmp_path / "run", "pretrain"), ["dp1.zero0"], device="cuda")
    assert report.passed, [v.sentence() for v in report.verdicts]
