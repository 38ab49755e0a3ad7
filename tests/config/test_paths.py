"""One rule for what a path in a recipe may stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from shardwise.config.paths import expand
from shardwise.config.schema import TokenizerConfig
from shardwise.data.source import DataSource
from shardwise.errors import UserError


def test_home_and_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "in/here")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("~/x") == tmp_path / "x"
    assert expand("a/${WHERE}/b") == Path("a/in/here/b")
    for literal in ("a~", "a/~/b", "$WHERE", "${}", "a*[1]"):
        assert expand(literal) == Path(literal)
    with pytest.raises(ValueError, match="NOWHERE is not set"):
        expand("${NOWHERE}/x")
    with pytest.raises(ValueError, match="no_such_user"):
        expand("~no_such_user/x")


def test_every_section_follows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataSource(kind="text", path=Path("~/a")).path == tmp_path / "a"
    assert TokenizerConfig(kind="file", path=Path("~/t")).path == tmp_path / "t"
    with pytest.raises(ValidationError, match="NOWHERE is not set"):
        DataSource(kind="text", path=Path("${NOWHERE}"))


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "a" * 256, "a/" * 2048])
def test_what_can_be_no_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="can be no path"):
        expand(text)
    assert expand("a" * 255 + "/b") == Path("a" * 255, "b")
