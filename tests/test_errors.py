"""Exit codes stand in one table, and README shows that table."""

from __future__ import annotations

import re
from pathlib import Path

from shardwise.errors import EXIT_CODES, ExitCode

ROOT = Path(__file__).parents[1]


def test_readme_shows_the_exit_codes() -> None:
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\d+|128 \+ n) \| (.+) \|$", text, re.MULTILINE)
    assert dict(rows) == EXIT_CODES
    assert {str(int(code)) for code in ExitCode} | {"128 + n"} == EXIT_CODES.keys()


def test_the_changelog_names_no_other_exit_code() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    named = re.findall(r"[Ee]xit codes? (\d+)", text)
    assert set(named) <= EXIT_CODES.keys()


def test_every_error_of_the_package_has_a_code_of_the_table() -> None:
    given = set()
    for path in (ROOT / "framework" / "shardwise").rglob("*.py"):
        given |= set(
            re.findall(r"^    exit_code(?:: int)? = (.+)$", path.read_text(), re.MULTILINE)
        )
    assert given and all(value.startswith("ExitCode.") for value in given), given
