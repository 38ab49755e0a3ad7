"""Completions and figures of ranks that share a model, by the commands: those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command, shardwise  # noqa: F401  # a fixture
from tests.serve.support import write_model


@pytest.mark.slow
def test_ranks_that_share_a_model_complete_as_one(
    shardwise: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    write_model(model := tmp_path / "model")
    asked = ("generate", model, "-p", "hi", "-p", "ho", "--temperature", "1", "--samples", "2")
    said = {}
    for tp in (1, 2):
        code, _, err = shardwise(
            *asked, "--max-new-tokens", 6, "--tp", tp, "--json", tmp_path / "o"
        )
        assert code == 0, err
        found = json.loads((tmp_path / "o").read_text())
        said[tp] = [c["completion"]["token_ids"] for one in found for c in one["completions"]]
    assert said[1] == said[2] and len(said[1]) == 4
    code, _, err = shardwise(*asked, "--tp", 3)
    assert code == 2 and "does not divide num_heads 4" in err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, _, err = shardwise(*asked, "--tp", 2)
    assert code == 2 and "torchrun has started 4 ranks; give --tp 4" in err


@pytest.mark.slow
def test_ranks_that_share_a_model_are_measured_as_one(
    shardwise: Command, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    write_model(model := tmp_path / "model")
    (text := tmp_path / "text.txt").write_text("the quick brown fox. " * 30)
    asked = ("evaluate", model, "--bits-per-byte", text, "--seq-len", 32, "--json", tmp_path / "o")
    found = []
    for tp in (1, 2):
        code, _, err = shardwise(*asked, "--tp", tp)
        assert code == 0, err
        found.append(json.loads((tmp_path / "o").read_text()))
    one, two = (f["val_bits_per_byte"] for f in found)
    assert two == pytest.approx(one, rel=1e-6)
