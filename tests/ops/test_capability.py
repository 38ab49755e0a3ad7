"""The capability table: one row a library, and the wrong apex is told from the right one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from shardwise.ops import bitsandbytes, compiled, cpu_attention
from shardwise.ops.capability import capabilities
from tests.contracts.transformer_engine import installed


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
        "cpu_kernels",
        "bitsandbytes",
        "deepspeed",
        "megatron_core",
    ]
    assert all(r.detail and r.purpose for r in rows)
    if not torch.cuda.is_available():
        cpu = {"cpu_kernels"} if compiled.unusable(cpu_attention.library) is None else set()
        if bitsandbytes.unusable(torch.device("cpu")) is None:
            cpu.add("bitsandbytes")
        engines = {"deepspeed": "deepspeed", "megatron_core": "megatron"}
        cpu |= {row for row, package in engines.items() if find_spec(package)}
        assert {r.library for r in rows if r.used} == {"float8"} | cpu  # float8: part of torch


def test_the_recipes_that_a_gpu_has_products_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _row("transformer_engine") == (False, "no CUDA device")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with installed("2.18.0", device=False):
        assert _row("transformer_engine")[0]
        purpose = next(r.purpose for r in capabilities() if r.library == "transformer_engine")
    assert "block: yes" in purpose
    assert "mxfp8: mxfp8 scaling needs a GPU of compute capability 10.0 or more" in purpose


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
    assert not used  # there is no GPU
    assert ("web toolkit" in detail) != genuine
