"""A pytest fixture for people who change a model: layouts of a recipe, proved in a test.

    def test_layouts(verify_layouts):
        verify_layouts("recipe.yaml", ["tp2", "dp2.zero3"])

pytest finds it through the package's entry point. Torch is imported when a test first uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from shardwise.verify.verdict import VerifyReport


class VerifyLayouts(Protocol):
    """What the fixture `verify_layouts` is."""

    def __call__(
        self,
        config: str | Path | Mapping[str, Any],
        layouts: Sequence[str] = (),
        *,
        stage: str | None = None,
        overrides: Sequence[str] = (),
    ) -> VerifyReport:
        """As `shardwise.verify`; a layout that differs, or cannot be, fails the test."""


@pytest.fixture(scope="session")
def verify_layouts() -> Iterator[VerifyLayouts]:
    """Compares layouts of a recipe with one process; the rank processes live for the session."""
    from shardwise.verify import server

    with server.importing():
        from shardwise.verify.pool import RankPool
        from shardwise.verify.run import verify

    pool = RankPool()

    def call(
        config: str | Path | Mapping[str, Any], layouts: Sequence[str] = (), **options: Any
    ) -> VerifyReport:
        __tracebackhide__ = True
        report = verify(config, layouts, pool=pool, **options)
        wrong = [
            f"{v.stage} on {v.layout} in {v.precision}: {v.sentence()}"
            for v in report.verdicts
            if not v.passed
        ]
        wrong += [f"{x} cannot be: {report.refused[x]}" for x in report.impossible]
        if not report.verdicts and not wrong:
            wrong = [f"{x} cannot be: {reason}" for x, reason in report.refused.items()]
        if not report.passed:
            pytest.fail("\n".join(wrong), pytrace=False)
        return report

    yield call
    pool.close()
