"""Any decoder with a scalar head, there and back through Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardwise.errors import CheckpointError
from shardwise.models import registry
from shardwise.models.common.init import init_weights, load_weights


def configs() -> list[object]:
    from shardwise.models.dense.gpt2 import GPT2Config
    from tests.support import toy

    gpt2 = GPT2Config(vocab_size=50, max_seq_len=32, hidden_size=16, num_layers=2, num_heads=2)
    return [toy.llama(), gpt2]


@pytest.mark.parametrize("index", [0, 1], ids=["llama", "gpt2"])
def test_folder_loads_in_transformers_with_equal_scores(tmp_path: Path, index: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = configs()[index].as_scalar()  # type: ignore[attr-defined]
    model = registry.build(config)
    init_weights(model, 3)
    assert model.head.weight.shape == (1, config.hidden_size)
    parameters = sum(p.numel() for p in model.parameters())
    assert config.num_parameters() == parameters
    registry.to_hf(
        tmp_path, config, model.named_parameters(), stop_ids=[1], named_ids={"eos": 1, "pad": 0}
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 3, 7]])
    with torch.no_grad():
        ours = model(ids, torch.arange(4)[None])[0, -1, 0]
        found = theirs(input_ids=ids).logits
    assert found.shape == (1, 1)
    torch.testing.assert_close(found[0, 0], ours, rtol=1e-5, atol=1e-6)
    back, tensors = registry.from_hf(tmp_path)
    assert back.head == "scalar" and not back.tie_embeddings
    again = registry.build(back)
    load_weights(again, tensors)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_several_labels_are_refused() -> None:
    from shardwise.models.common.hf_config import head_from_hf

    raw = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    with pytest.raises(CheckpointError, match="2 labels"):
        head_from_hf(raw, tied=True)


def test_a_scalar_head_is_never_tied() -> None:
    said = configs()[0].model_dump() | {"head": "scalar"}  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cannot be tied"):
        registry.config_class("llama").model_validate(said)
