"""Verify verified by edits of the source: every planted bug is caught, and named."""

from __future__ import annotations

import pytest

from shardwise.config.load import load_config
from tests.verify.edited_bugs import BUGS
from tests.verify.edits import applied


@pytest.mark.parametrize("name", BUGS)
def test_every_edit_fits_the_source_and_lives(name: str) -> None:
    bug = BUGS[name]
    load_config(bug.recipe())
    with applied(bug.edits) as changed:
        assert changed
