"""Parity with transformers in both directions, and folders that are not as they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardwise.errors import CheckpointError
from shardwise.models import travel
from shardwise.models.common.init import init_weights, load_weights
from shardwise.models.dense.gpt2 import GPT2Config
from shardwise.models.dense.llama import LlamaConfig
from shardwise.models.dense.phi3 import Phi3Config
from shardwise.models.registry import build, from_hf, from_hf_tensors, to_hf, to_hf_tensors

transformers = pytest.importorskip("transformers", exc_type=ImportError)

from tests.models.families import FAMILIES, hf_model, inputs  # noqa: E402
from tests.support import toy  # noqa: E402


def _load(folder: Path) -> nn.Module:
    config, named = from_hf(folder)
    model = build(config)
    load_weights(model, named)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_with_transformers(name: str, tmp_path: Path) -> None:
    """Theirs to ours, ours to theirs: the same logits within 1e-5, in shards too."""
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    ours = _load(tmp_path / "theirs")
    ids, positions = inputs()
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids, positions), expected, atol=1e-5, rtol=0)
        assert float(expected.std()) > 0.1  # the comparison would see a wrong model

        named = ours.named_parameters()
        to_hf(tmp_path / "ours", ours.config, named, max_shard_size=30_000, stop_ids=[7])  # type: ignore[arg-type]
        assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
        again, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", attn_implementation="eager", output_loading_info=True
        )
        assert type(again) is type(theirs)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)
        assert again.generation_config.eos_token_id == 7
    assert from_hf(tmp_path / "ours")[0] == ours.config


@pytest.mark.parametrize("name", ["llama2", "qwen2", "gpt2"])
def test_streams_are_inverse(name: str, tmp_path: Path) -> None:
    hf_model(name).save_pretrained(tmp_path)
    model = _load(tmp_path)
    config: Any = model.config
    there = list(to_hf_tensors(config, model.named_parameters()))
    back = dict(from_hf_tensors(config, there))
    expected = dict(model.named_parameters())
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], expected[key]) for key in expected)


def test_small_folder_is_one_file_and_converts_dtype(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, hidden_size=8, num_layers=1, num_heads=2, max_seq_len=8)
    model = build(config)
    to_hf(tmp_path, config, model.named_parameters(), dtype=torch.bfloat16)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {t.dtype for _, t in from_hf(tmp_path)[1]} == {torch.bfloat16}


def test_bare_decoder_names_and_constant_masks(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints lack the prefix and carry causal masks."""
    theirs = hf_model("gpt2")
    config = from_hf_config(theirs, tmp_path)
    bare = [(k.removeprefix("transformer."), v) for k, v in theirs.state_dict().items()]
    bare.append(("h.0.attn.bias", torch.ones(1, 1, 64, 64)))
    found = dict(from_hf_tensors(config, bare))
    assert torch.equal(found["embed.weight"], theirs.transformer.wte.weight)


def from_hf_config(theirs: Any, folder: Path) -> Any:
    theirs.save_pretrained(folder)
    return from_hf(folder)[0]


TINY = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "ffn_size": 8,
}


def _folder(tmp_path: Path) -> Path:
    config = LlamaConfig(**TINY)  # type: ignore[arg-type]
    model = build(config)
    init_weights(model, 0)
    to_hf(tmp_path, config, model.named_parameters(), max_shard_size=1000)
    return tmp_path


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "bert"}, "'bert' is not supported"),
        (
            {"model_type": "gpt_oss", "num_local_experts": 8, "sinks": True},
            "missing here: a mixture of experts; the nearest by its keys is llama, which does not",
        ),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"mlp_bias": True}, r"missing.*mlp\.gate_proj\.bias"),
        ({"rope_scaling": {"rope_type": "fourier", "factor": 2.0}}, "'fourier'"),
        ({"num_key_value_heads": 3}, "num_heads"),
        ({"hidden_size": 16}, "shape"),
        ({"num_hidden_layers": 2}, "missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; allowed: an integer, at least 1"),
        ({"hidden_size": "8"}, "hidden_size is '8'; allowed"),
        ({"rope_scaling": [1]}, r"config\.json: a value of a kind that cannot be"),
        ({"architectures": 5}, r"config\.json: a value of a kind that cannot be"),
        ({"attention_bias": True}, "missing"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, r"config\.json: auto_map names code"),
        ({"is_causal": False}, "is_causal = False"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "smollm3", "no_rope_layers": []}, "no_rope_layers are 0, and there are 1"),
        ({"model_type": "smollm3", "layer_types": ["sliding_attention"]}, "set use_sliding_window"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.3}, "rotates 1 of 4 features"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "longrope"),
        ({"model_type": "mistral", "layer_types": ["full_attention"]}, "layer_types of mistral"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4}
            | {"layer_types": ["chunked_attention"]},
            "chunked_attention",
        ),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = _folder(tmp_path)
    _edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        _load(folder)


def test_code_that_a_phi3_folder_names_is_not_needed(tmp_path: Path) -> None:
    """Its releases came before transformers' class, and still name theirs."""
    hf_model("phi3").save_pretrained(tmp_path / "theirs")
    _edit(tmp_path / "theirs" / "config.json", auto_map={"AutoModelForCausalLM": "modeling_phi3.X"})
    ours = _load(tmp_path / "theirs")
    carried = travel.read(tmp_path / "theirs")
    to_hf(tmp_path / "ours", ours.config, ours.named_parameters(), carried=carried)  # type: ignore[arg-type]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(again).__module__ == "transformers.models.phi3.modeling_phi3"


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=shard.name):
        _load(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        _load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="neither"):
        _load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        _load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist") as told:
        _load(folder)
    assert told.value.exit_code == 2  # nothing is damaged: the path is wrong


def test_index_cannot_point_outside(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    for weight_map in ({"x": "../secret.safetensors"}, {"x": ["model"]}, [], None):
        _edit(folder / "model.safetensors.index.json", weight_map=weight_map)
        with pytest.raises(CheckpointError, match="files of this folder"):
            _load(folder)


def test_export_refuses_what_transformers_lacks(tmp_path: Path) -> None:
    config = LlamaConfig(**TINY, o_bias=True)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no transformers class"):
        to_hf(tmp_path, config, build(config).named_parameters())


def test_export_refuses_a_rope_scaling_that_phi3_lacks(tmp_path: Path) -> None:
    scaling = {"kind": "linear", "factor": 2.0}
    config = Phi3Config(**TINY | {"rope_scaling": scaling})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"linear: phi3.s class has longrope"):
        to_hf(tmp_path, config, build(config).named_parameters())


def test_export_needs_every_parameter(tmp_path: Path) -> None:
    config = LlamaConfig(**TINY)  # type: ignore[arg-type]
    named = list(build(config).named_parameters())
    with pytest.raises(CheckpointError, match="missing from the export"):
        to_hf(tmp_path, config, named[1:])
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(CheckpointError, match="no place"):
        to_hf(tmp_path, config, [*named, ("extra", torch.zeros(1))])


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_keys_that_are_not_there_mean_what_the_class_says(name: str, tmp_path: Path) -> None:
    theirs = hf_model(name).config
    theirs.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("head_dim", "num_key_value_heads", "max_position_embeddings", "sliding_window"):
        raw.pop(key, None)
    raw |= {"num_attention_heads": 32, "hidden_size": 64, "use_sliding_window": True}
    raw |= {"max_window_layers": 1, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    to_hf(tmp_path, toy.llama(), build(toy.llama()).named_parameters(), carried={})
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = from_hf(tmp_path)[0]
    assert isinstance(ours, LlamaConfig)
    assert ours.num_kv_heads == read.num_key_value_heads
    assert ours.head_width == (getattr(read, "head_dim", None) or 2)
    assert ours.max_seq_len == read.max_position_embeddings
    assert ours.sliding_window == read.sliding_window
