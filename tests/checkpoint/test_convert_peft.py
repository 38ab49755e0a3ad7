"""Adapters between checkpoints of any layout and PEFT's folders, bit by bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardwise import checkpoint
from shardwise.adapters import peft_read
from shardwise.adapters.peft import WEIGHTS, PeftAdapter, Update
from shardwise.adapters.peft_write import write
from shardwise.checkpoint import adapted
from shardwise.checkpoint.convert import MODEL_FILE, convert, open_model
from shardwise.config.adapters import AdapterConfig
from shardwise.errors import UserError
from shardwise.models import registry
from tests.adapters.support import adapter, native, update
from tests.models.families import inputs
from tests.support import toy
from tests.support.pool import RankPool

MODEL = toy.llama(vocab_size=96, max_seq_len=64, tie_embeddings=False)
GPT2 = toy.gpt2(vocab_size=96, max_seq_len=64, dropout=0.0)
SEED = 7  # of `tests.adapters.support`


def saved(model: Any, asked: AdapterConfig, layout: str, root: Path) -> dict[str, Tensor]:
    """Save an adapter that has learnt a little; returns its parameters, whole."""
    engine = native(model, asked, layout, precision="fp32")
    update(engine, 0)
    state = engine.state_dict()
    files = {
        MODEL_FILE: model.model_dump_json().encode(),
        adapted.ADAPTER_FILE: adapted.description(asked, None, SEED, root),
    }
    checkpoint.save(root, 1, state.tensors, state.meta, files)
    return {n: t.clone() for n, t in engine.full("weights") if ".adapter." in n}


def logits(path: Path, base: Path | None = None) -> Tensor:
    opened = open_model(path, base)
    model = registry.build(opened.config)
    with torch.no_grad():
        for name, value in opened.tensors:
            model.get_parameter(name).copy_(value)
        return model(*inputs())


CASES: dict[str, tuple[Any, AdapterConfig, str]] = {
    "lora": (MODEL, adapter(targets=["q", "down", "head"], alpha=3.0), "tp2"),
    "dora": (MODEL, adapter("dora", rslora=True, init="pissa"), "pp2"),
    "fused": (GPT2, adapter(targets=["q", "k", "v"]), "dp2.zero3"),
}


@pytest.mark.parametrize("case", CASES)
def test_out_and_in_again(case: str, ranks: RankPool, tmp_path: Path) -> None:
    there_and_back(*CASES[case], ranks, tmp_path, world=2)


@pytest.mark.slow
def test_out_of_four_ranks(ranks: RankPool, tmp_path: Path) -> None:
    there_and_back(*CASES["lora"][:2], "tp2.pp2", ranks, tmp_path, world=4)


def there_and_back(
    model: Any, asked: AdapterConfig, layout: str, ranks: RankPool, folder: Path, world: int
) -> None:
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    peft = pytest.importorskip("peft", exc_type=ImportError)
    root, base, out, back = (folder / name for name in ("run", "base", "peft", "back"))
    own = ranks.run(saved, model, asked, layout, root, world=world)[0]
    registry.to_hf(base, model, adapted.initial_tensors(model, SEED))
    convert(root, out, "peft")
    expected = logits(root)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(theirs, out)
    result = loaded.load_adapter(out, "again")
    assert not result.missing_keys and not result.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs()[0]).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(out, base), expected, atol=1e-5, rtol=1e-5)
    if asked.model_dump()["init"] == "pissa":  # leaves as an update of twice the rank
        return
    convert(out, back, "native", base=base)
    again = adapted.own_tensors(checkpoint.resolve(back))
    if model is not GPT2:  # q, k and v come back with all of their A's
        assert again.keys() == own.keys()
        assert all(torch.equal(again[n], own[n]) for n in own)
    torch.testing.assert_close(logits(back), expected, atol=1e-5, rtol=1e-5)


def test_what_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    root, out = tmp_path / "run", tmp_path / "peft"
    ranks.run(saved, MODEL, CASES["lora"][1], "dp1", root, world=1)
    with pytest.raises(UserError, match=r"--merge-adapter .*--to peft"):
        convert(root, tmp_path / "hf")
    convert(root, out, "peft")
    with pytest.raises(UserError, match="base_model_name_or_path is None"):
        open_model(out)
    base = tmp_path / "base"
    registry.to_hf(base, MODEL, adapted.initial_tensors(MODEL, SEED))
    with pytest.raises(UserError, match="holds no adapter"):
        convert(base, tmp_path / "x", "peft")
    assert peft_read.read(out, MODEL).base_hash is None  # of a seed's weights
    convert(out, tmp_path / "native", "native", base=base)
    convert(tmp_path / "native", tmp_path / "again", "peft")
    other = tmp_path / "other"
    registry.to_hf(other, MODEL, adapted.initial_tensors(MODEL, SEED + 1))
    with pytest.raises(UserError, match="belongs to other weights"):
        open_model(tmp_path / "again", other)
    held = load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(held[k], v) for k, v in load_file(out / WEIGHTS).items())
    shutil.rmtree(base)
    with pytest.raises(UserError, match="gone"):
        convert(tmp_path / "native", tmp_path / "y", "peft")


def test_ranks_that_differ_go_on_or_are_merged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    registry.to_hf(base, MODEL, adapted.initial_tensors(MODEL, SEED))
    updates = {
        f"layers.{i}.attn.q": Update(torch.randn(2 + i, 32), torch.randn(32, 2 + i), 4.0)
        for i in range(2)
    }
    write(tmp_path / "a", PeftAdapter(updates, False), MODEL, str(base))
    convert(tmp_path / "a", tmp_path / "n", "native")
    torch.testing.assert_close(logits(tmp_path / "n"), logits(tmp_path / "a"))
    convert(tmp_path / "a", tmp_path / "h", "hf", merge_adapter=True)
    assert torch.equal(logits(tmp_path / "h"), logits(tmp_path / "a"))
