"""What docs/verify.md shows is true: its workflow is YAML, and the command in it passes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_workflows_command_passes(
    shardwise: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workflow: dict[Any, Any] = yaml.safe_load(_block("yaml"))
    assert workflow[True] == ["pull_request"]  # YAML 1.1 reads "on" as a truth value
    [job] = workflow["jobs"].values()
    commands = [shlex.split(step["run"]) for step in job["steps"] if "run" in step]
    [command] = [c[1:] for c in commands if c[0] == "shardwise"]
    [kept] = [s["with"]["path"] for s in job["steps"] if "upload-artifact" in s.get("uses", "")]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    code, out, err = shardwise(*command, "--updates-only")  # the whole path is tested elsewhere
    assert code == 0, out + err
    suite = ElementTree.parse(tmp_path / kept).getroot()
    tried = {case.get("name", "").split()[0] for case in suite}
    asked = {command[i + 1] for i, word in enumerate(command) if word == "--layout"}
    assert tried == asked
    assert suite.get("failures") == suite.get("errors") == "0"


def test_the_pages_test_asks_for_the_fixture() -> None:
    code = compile(_block("python"), "page", "exec")
    [function] = [c for c in code.co_consts if hasattr(c, "co_varnames")]
    assert function.co_varnames[: function.co_argcount] == ("verify_layouts",)


def test_links_and_picture_are_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
    ElementTree.parse(ROOT / "docs" / "verify.svg")
