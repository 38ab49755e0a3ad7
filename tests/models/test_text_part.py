"""Folders of multimodal models, as transformers writes them: their text model, and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardwise.errors import CheckpointError
from shardwise.models import registry, text_part, travel
from shardwise.models.common.init import load_weights
from shardwise.models.hf_folder import read_config
from shardwise.models.releases import release_of

t = pytest.importorskip("transformers", exc_type=ImportError)

from tests.models.families import inputs  # noqa: E402
from tests.models.wholes import WHOLES, whole_model  # noqa: E402

# Of Qwen's text models, which have a name of their own, what is another class's.
OTHER_NAME = {"model_type", "rope_parameters", "layer_types"}
ONE = "mistral3-small"


def _load(folder: Path) -> Any:
    config, named = registry.from_hf(folder)
    model = registry.build(config)
    load_weights(model, named)
    return model


def test_every_class_is_held_to_transformers() -> None:
    assert {name.partition("-")[0] for name in WHOLES} == set(text_part.WRAPPERS)


@pytest.mark.parametrize("name", WHOLES)
def test_text_model_computes_what_the_whole_does(name: str, tmp_path: Path) -> None:
    """From shards, and out again as a folder of the text model's own class."""
    whole = whole_model(name)
    whole.save_pretrained(tmp_path / "whole", max_shard_size="30KB")
    assert (tmp_path / "whole" / text_part.INDEX).exists()
    ours = _load(tmp_path / "whole")
    ids, positions = inputs()
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(ours(ids, positions), expected, atol=1e-5, rtol=0)
        carried = travel.read(tmp_path / "whole")
        registry.to_hf(tmp_path / "own", ours.config, ours.named_parameters(), carried=carried)
        again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
        torch.testing.assert_close(again(ids).logits, expected, atol=1e-5, rtol=0)
    text, made = whole.config.text_config, again.config.to_dict()
    named = not name.startswith("qwen")
    assert type(again.config) is type(text) or not named
    if hasattr(whole.config, "tie_word_embeddings"):
        text.tie_word_embeddings = whole.config.tie_word_embeddings
    differ = {k for k, v in text.to_dict().items() if made.get(k) != v}
    assert differ - {"dtype", "architectures", "_name_or_path"} <= (set() if named else OTHER_NAME)
    stored = dict(again.named_parameters())
    inside = whole.get_decoder().state_dict()
    assert all(torch.equal(v, stored[f"model.{k}"]) for k, v in inside.items())
    assert read_config(tmp_path / "own") == ours.config


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole_model("gemma3").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    registry.from_hf(tmp_path)
    registry.from_hf(tmp_path)
    assert len(caplog.records) == 1
    said = caplog.text
    assert "the text model of Gemma3ForConditionalGeneration; left out: multi_modal_proj" in said
    assert "vision_tower (34 tensors) and preprocessor_config.json" in said


@pytest.mark.parametrize("layout", ["model.language_model.", "language_model."])
def test_names_of_every_version(layout: str, tmp_path: Path) -> None:
    """Transformers 4.52 has the head outside; the bare model has no ``model.`` inside."""
    whole_model(ONE).save_pretrained(tmp_path)
    expected = dict(registry.from_hf(tmp_path)[1])
    file = tmp_path / text_part.SINGLE
    stored = {
        k.replace("language_model.model.", layout).replace("language_model.lm", "lm"): v
        for k, v in load_file(file).items()
    }
    save_file(stored, file)
    found = dict(registry.from_hf(tmp_path)[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_tensor_of_no_known_part_is_named(tmp_path: Path) -> None:
    whole_model(ONE).save_pretrained(tmp_path)
    file = tmp_path / text_part.SINGLE
    stored = load_file(file)
    for name, said in (
        ("model.cross_attention.q.weight", "of no part of a multimodal model"),
        ("language_model.model.layers.0.gate.weight", "not part of this model family"),
        ("model.language_model.norm.weight", "stored twice"),
    ):
        save_file(stored | {name: torch.zeros(2)}, file)
        with pytest.raises(CheckpointError, match=said):
            dict(registry.from_hf(tmp_path)[1])


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


def test_where_configs_disagree_on_the_head_the_weights_decide(tmp_path: Path) -> None:
    whole_model("mistral3").save_pretrained(tmp_path)
    assert read_config(tmp_path).tie_embeddings
    whole_model(ONE).save_pretrained(tmp_path)
    for said in ({}, {"tie_word_embeddings": True}):
        _edit(tmp_path, lambda raw: raw.pop("tie_word_embeddings", None))  # as on the hub
        _edit(tmp_path, lambda raw, said=said: raw.update(said))  # type: ignore[misc]
        assert not read_config(tmp_path).tie_embeddings
    _edit(tmp_path, lambda raw: raw["text_config"].update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="both are stored and differ"):
        _load(tmp_path)


def test_keys_that_a_hub_folder_leaves_out(tmp_path: Path) -> None:
    """Gemma 3's says five; the others, and tokens that end a text, are elsewhere."""
    raw = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = t.AutoConfig.from_pretrained(tmp_path).text_config
    theirs.save_pretrained(tmp_path / "text")
    assert read_config(tmp_path).spec == read_config(tmp_path / "text").spec  # type: ignore[attr-defined]
    assert travel.end_ids(travel.read(tmp_path)) == (1, 106)
    assert text_part.described(tmp_path).endswith("left out: all else")


def test_keys_of_the_text_model_among_the_whole_s(tmp_path: Path) -> None:
    """Qwen2-VL and 2.5-VL on the hub: their config, and their names of tensors."""
    whole = whole_model("qwen2_5_vl")
    whole.save_pretrained(tmp_path)
    expected = dict(registry.from_hf(tmp_path)[1])
    raw = json.loads((tmp_path / "config.json").read_text())
    text = raw.pop("text_config")
    text["rope_scaling"] = text.pop("rope_parameters") | {"type": "mrope", "rope_type": "mrope"}
    (tmp_path / "config.json").write_text(json.dumps(text | raw))
    stored = load_file(tmp_path / text_part.SINGLE)
    assert "visual.patch_embed.proj.weight" in stored
    assert "model.layers.0.mlp.up_proj.weight" in stored
    theirs = t.AutoConfig.from_pretrained(tmp_path).text_config
    config, named = registry.from_hf(tmp_path)
    assert config.rope_base == theirs.rope_parameters["rope_theta"]  # type: ignore[attr-defined]
    assert config.norm_eps == theirs.rms_norm_eps  # type: ignore[attr-defined]
    assert all(torch.equal(v, expected[k]) for k, v in named)


@pytest.mark.parametrize("name", text_part.WRAPPERS)
def test_text_models_are_their_classes_by_default(name: str, tmp_path: Path) -> None:
    """A text_config that says nothing."""
    whole = t.AutoConfig.for_model(name, text_config={})
    raw = {"model_type": name, "text_config": {}}
    raw["tie_word_embeddings"] = getattr(whole, "tie_word_embeddings", False)
    ours = release_of(text_part.own_config(raw, tmp_path)["model_type"])
    assert ours is not None
    empty = ours.read(text_part.own_config(raw, tmp_path))
    whole.save_pretrained(tmp_path)
    said = text_part.own_config(json.loads((tmp_path / "config.json").read_text()), tmp_path)
    assert empty.without_dropout() == ours.read(said).without_dropout()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised by fp8"),
        ({"model_type": "paligemma"}, "whether it computes what the mistral of its text_config"),
        ({"text_config": {"model_type": "mamba"}}, "'mamba' is not supported"),
        ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0"),
        ({"text_config": {"model_type": ["llama"]}}, r"text_config: model_type is \['llama'\]"),
        ({"model_type": ["llava"]}, r"model_type \['llava'\] is not supported"),
    ],
)
def test_wholes_that_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole_model(ONE).save_pretrained(tmp_path)
    _edit(tmp_path, lambda raw: raw.update(change))
    with pytest.raises(CheckpointError, match=said):
        _load(tmp_path)
