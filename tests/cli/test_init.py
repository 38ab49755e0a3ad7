"""`shardwise init` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Command
from tests.recipes.tiny import data_file, model_folder


def test_init(shardwise: Command, tmp_path: Path) -> None:
    model = model_folder("llama2", tmp_path / "model")
    data, out = data_file("sft", "messages", tmp_path), tmp_path / "recipe.yaml"
    args = ["init", model, data, "--stage", "sft", "--out", out]
    code, text, err = shardwise(*args)
    assert code == 0, err
    assert "batch.seq_len: 64: 95 %" in text and text.splitlines()[-1].startswith(f"written: {out}")
    code, _, err = shardwise(*args)
    assert code == 2 and "--force" in err and len(err.splitlines()) == 1
    code, text, _ = shardwise(*args, "--force", "--adapter", "lora", "--json", "-")
    found = json.loads(text)
    assert code == 0 and found["train"] == f"shardwise train {out}"
    assert {"keys": ["stages", 0, "adapter", "rank"], "value": 16, "why": ""} in found["choices"]
    assert shardwise(*args[:3], "--stage", "pretrained")[0] == 2
