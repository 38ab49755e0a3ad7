"""Every class of transformers that we read: the same config, tensors, logits and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise.models import registry, travel
from shardwise.models.common.init import load_weights
from shardwise.models.hf_folder import read_config, write_config
from shardwise.models.releases import release_of, releases
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Request

transformers = pytest.importorskip("transformers", exc_type=ImportError)

from tests.models.families import FAMILIES, hf_model  # noqa: E402

# What transformers writes of itself, or has a default for, and no computation reads.
_THEIRS = {"architectures", "dtype", "transformers_version", "_name_or_path", "attention_dropout"}
_THEIRS |= {"pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "initializer_range"}
_THEIRS |= {"partial_rotary_factor"}  # it stands in rope_parameters


def _said(config: Any) -> dict[str, Any]:
    said = {k: v for k, v in config.to_dict().items() if k not in _THEIRS}
    said.get("rope_parameters", {}).pop("type", None)  # rope_type stands beside it
    return said


@pytest.mark.parametrize("name", FAMILIES)
def test_config_is_the_same_in_both_directions(name: str, tmp_path: Path) -> None:
    """Written by us alone, without the file that came with it."""
    theirs = hf_model(name).config
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    write_config(tmp_path, ours, {})
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    assert _said(again) == _said(theirs)
    assert read_config(tmp_path) == ours


@pytest.mark.parametrize("name", [r.model_type for r in releases()])
def test_keys_that_are_not_there_are_the_class_s_own(name: str) -> None:
    release = release_of(name)
    assert release is not None
    theirs = transformers.AutoConfig.for_model(name).to_dict()
    ours, expected = release.read({"model_type": name}), release.read(theirs)
    assert ours.spec == expected.spec
    assert ours.max_seq_len == expected.max_seq_len


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_tensors_are_the_same_bits_in_shards(name: str, tmp_path: Path) -> None:
    theirs = hf_model(name).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    config, named = registry.from_hf(tmp_path / "theirs")
    carried = travel.read(tmp_path / "theirs")
    registry.to_hf(tmp_path / "ours", config, named, max_shard_size=20_000, carried=carried)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key
    there = json.loads((tmp_path / "theirs" / "config.json").read_text())
    here = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert here | {"dtype": None} == there | {"dtype": None}


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_and_packed_rows(name: str, tmp_path: Path) -> None:
    """Tokens of `generate`; documents of one row, each as transformers computes it alone."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    config, named = registry.from_hf(tmp_path)
    model: Any = registry.build(config)
    load_weights(model, named)
    lengths = [9, 17, 6]
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(96, (1, n), generator=generator) for n in lengths]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        packed = model(torch.cat(rows, 1), positions, segments)
        alone = torch.cat([theirs(row).logits for row in rows], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)

    ours = Generator(config)
    ours.update_weights(registry.to_hf_tensors(config, model.named_parameters()))
    prompts = [row[0].tolist() for row in rows]
    sampling = Sampling(greedy=True, max_new_tokens=12)
    found = ours.generate([Request(i, p) for i, p in enumerate(prompts)], sampling)
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
