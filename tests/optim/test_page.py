"""What docs/optimizers.md shows is true: its recipes load, its table is the formulas'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwise.config import registry as configs
from shardwise.config import yaml12
from shardwise.config.load import load_config
from shardwise.memory import ModelShape
from shardwise.memory.optimizers import table
from shardwise.stages.run import preflight

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
SMOLLM2_135M = ModelShape(576, 30, 9, 3, 64, 1536, 49152)
BLOCKS = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_table_is_that_of_the_formulas() -> None:
    assert table(SMOLLM2_135M) in PAGE


@pytest.mark.parametrize("text", BLOCKS, ids=range(len(BLOCKS)))
def test_the_recipes_start(text: str, tmp_path: Path) -> None:
    model = {"family": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    model |= {"num_kv_heads": 2, "ffn_size": 32, "tie_embeddings": False}
    stage = {"kind": "pretrain", "steps": 1, "data": {"sources": [{"kind": "stdlib"}]}}
    stage |= yaml12.parse(text, "page").data
    loaded = load_config({"model": model, "run_dir": str(tmp_path), "stages": [stage]})
    preflight(loaded.config, 1)


def test_every_kind_is_told() -> None:
    assert len(BLOCKS) >= 4
    assert all(f"`{kind}`" in PAGE for kind in configs.OPTIMIZER_CONFIGS)
