"""Which cases of a test run every day, and which among the slow proofs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def daily(cases: Iterable[Any], *kept: int) -> list[Any]:
    """Parameters of a test: those at the places ``kept`` run every day, the others are slow."""
    listed = [case if isinstance(case, tuple) else (case,) for case in cases]
    assert all(place < len(listed) for place in kept)
    return [
        pytest.param(*case, marks=[] if place in kept else [pytest.mark.slow])
        for place, case in enumerate(listed)
    ]
