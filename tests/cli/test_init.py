"""`shardwise init` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardwise.data.tokenizer import ByteTokenizer
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


def test_the_text_model_of_a_multimodal_folder(shardwise: Command, tmp_path: Path) -> None:
    """From init to a trained folder of the text model's own class, which transformers loads."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    from tests.models.wholes import whole_model

    model, out, run = tmp_path / "whole", tmp_path / "recipe.yaml", tmp_path / "run"
    trained = run / "stages" / "pretrain" / "checkpoints"
    tokenizer = ByteTokenizer()
    whole = whole_model("gemma3", tokenizer.vocab_size)
    whole.save_pretrained(model)
    tokenizer.save(model)
    part = "the text model of Gemma3ForConditionalGeneration; left out: multi_modal_projector, "
    data = data_file("pretrain", "documents", tmp_path)
    asked = ["--stage", "pretrain", "--adapter", "lora", "--out", out]
    code, text, err = shardwise("init", model, data, *asked)
    assert code == 0, err
    assert part in text and part.split(";")[0] in " ".join(out.read_text().split("\n# "))
    fewer = ["stages.0.steps=1", "stages.0.schedule.warmup_steps=0", "engine.compile=false"]
    code, text, err = shardwise("train", out, f"run_dir={run}", *fewer)
    assert code == 0, err
    summary = json.loads((run / "stages" / "pretrain" / "result.json").read_text())
    assert summary["part"].startswith(part)
    for source, place in ((model, "before"), (trained, "after")):
        merged = ["--merge-adapter"] if source == trained else []
        code, text, err = shardwise("convert", source, tmp_path / place, "--to", "hf", *merged)
        assert code == 0 and (part in text) == (source == model), err
    code, _, err = shardwise("convert", trained, tmp_path / "peft", "--to", "peft")
    assert code == 2 and "PEFT would look for its places in all of" in err
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / place)
        for place in ("before", "after")
    )
    assert type(after) is type(before) is transformers.Gemma3ForCausalLM
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters())]
    assert any(moved)
    asked = ["-p", "How", "--raw", "--max-new-tokens", "4", "--json", "-"]
    said = [shardwise("generate", place, *asked)[1] for place in (model, tmp_path / "before")]
    assert said[0] == said[1] != ""
    measured = ["--bits-per-byte", tmp_path / "text.txt", "--seq-len", "32", "--json", "-"]
    (tmp_path / "text.txt").write_text("Some text that is to be predicted. " * 5)
    code, text, err = shardwise("evaluate", model, *measured)
    assert code == 0 and json.loads(text)["val_bits_per_byte"] > 7, err
