"""The capability table: one row a library, and the wrong apex is told from the right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwise.ops.capability import capabilities


def _row(library: str) -> tuple[bool, str]:
    row = next(c for c in capabilities() if c.library == library)
    return row.used, row.detail


def test_every_row_has_a_reason() -> None:
    rows = capabilities()
    assert [r.library for r in rows] == [
        "flash_attn",
        "transformer_engine",
        "apex",
        "triton",
        "float8",
    ]
    assert all(r.detail and r.purpose for r in rows)
    if not torch.cuda.is_available():
        assert {r.library for r in rows if r.used} == {"float8"}  # part of torch


@pytest.mark.parametrize("genuine", [False, True])
def test_apex_of_the_wrong_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, genuine: bool
) -> None:
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if genuine:
        (package / "optimizers").mkdir()
        (package / "optimizers" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    used, detail = _row("apex")
    assert used == (genuine and torch.cuda.is_available())
    assert ("web toolkit" in detail) != genuine
