"""Verify verified by edits of the source: every planted bug is caught, and named."""

from __future__ import annotations

import pytest

from shardwise.config.load import load_config
from tests.verify import edited_bugs
from tests.verify.edited_path_bugs import PATH_BUGS
from tests.verify.edits import applied

BUGS = {**edited_bugs.BUGS, **PATH_BUGS}


@pytest.mark.parametrize("name", BUGS)
def test_every_edit_fits_the_source_and_lives(name: str) -> None:
    bug = BUGS[name]
    load_config(bug.recipe())
    with applied(bug.edits) as changed:
        assert changed


def test_there_are_enough_kinds() -> None:
    assert len(BUGS) == len(edited_bugs.BUGS) + len(PATH_BUGS) >= 70
    assert len({bug.kind for bug in BUGS.values()}) >= 30
    assert sum(bug.blind for bug in BUGS.values()) >= 10
