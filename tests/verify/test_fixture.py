"""The pytest fixture, in a project of a user's own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.cli.conftest import write_recipe

TESTS = """
import sys

BEFORE = "torch" in sys.modules

def test_without_it():
    assert not BEFORE and "torch" not in sys.modules

def test_a_layout(verify_layouts):
    report = verify_layouts("tiny.yaml", ["tp2"], stage="pretrain")
    assert "tp2" in {v.layout for v in report.verdicts}

def test_one_that_cannot_be(verify_layouts):
    verify_layouts("tiny.yaml", ["tp3"])

def test_one_that_differs(verify_layouts, monkeypatch):
    from shardwise.verify.verdict import Verdict
    from shardwise.verify.verifier import Verifier
    differs = lambda self, *a: Verdict("pretrain", "dp2", "fp64", {}, 0.0, problem="it differs")
    monkeypatch.setattr(Verifier, "check", differs)
    verify_layouts("tiny.yaml", ["dp2"])
"""


@pytest.mark.slow
def test_in_a_project_of_its_own(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "test_layouts.py").write_text(TESTS)
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "shardwise.verify.fixture", "-rf"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_layouts.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 2 passed" in done.stdout, done.stdout
    assert "tp3 cannot be: engine.layout: tp3: tp3 does not divide num_heads 2" in done.stdout
    assert "pretrain on dp2 in fp64: it differs" in done.stdout
    assert "Traceback" not in done.stdout  # the sentence alone


def test_pytest_finds_it_by_the_packages_entry_point() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    [(name, module)] = tomllib.loads(text)["project"]["entry-points"]["pytest11"].items()
    assert name == module == "shardwise.verify.fixture"
