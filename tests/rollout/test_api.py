"""`shardwise.generate` on a folder: chat by default, raw on demand, reproducible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import shardwise
from shardwise.adapters.peft import PeftAdapter, Update
from shardwise.adapters.peft_write import write
from shardwise.data.chat import render
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import UserError
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.rollout.api import encode_prompt, own_sampling
from shardwise.rollout.config import Sampling
from tests.support import toy

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = ByteTokenizer(chat_template=TEMPLATE)
    config = toy.llama(vocab_size=tokenizer.vocab_size, max_seq_len=64)
    model = registry.build(config)
    init_weights(model, 0)
    registry.to_hf(folder, config, model.named_parameters())
    tokenizer.save(folder)
    return folder


def test_one_prompt_many_prompts_and_conversations(folder: Path) -> None:
    sampling = Sampling(max_new_tokens=5)
    one = shardwise.generate(folder, "hi", sampling=sampling, num_samples=2)
    assert [len(group) for group in one] == [2]
    conversation = [{"role": "user", "content": "hi"}]
    assert shardwise.generate(folder, conversation, sampling=sampling, num_samples=2) == one
    both = shardwise.generate(folder, ["hi", conversation], sampling=sampling, num_samples=2)
    assert [g.text for g in both[0]] == [g.text for g in one[0]]
    assert shardwise.generate(folder, "hi", sampling=sampling, seed=1)[0][0] != one[0][0]


def test_prompts_are_rendered_by_the_template_or_left_alone() -> None:
    tokenizer = ByteTokenizer(chat_template=TEMPLATE)
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")) == "[user]hi[assistant]"
    system = encode_prompt(tokenizer, "hi", system="be")
    assert tokenizer.decode(system) == "[system]be[user]hi[assistant]"
    assert tokenizer.decode(encode_prompt(tokenizer, "hi", raw=True)) == "hi"
    assert tokenizer.decode(encode_prompt(ByteTokenizer(), "hi")) == "hi"
    with pytest.raises(UserError, match="chat template"):
        encode_prompt(tokenizer, "hi", raw=True, system="be")
    messages = [{"role": "user", "content": "hi"}]
    assert render(tokenizer, messages, add_generation_prompt=True) == "[user]hi[assistant]"


def test_a_folder_without_tokenizer(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="comes without a tokenizer"):
        shardwise.generate(tmp_path, "hi")


def test_the_models_own_sampling_stands_before_ours(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "max_new_tokens": 3}
    files = {"generation_config.json": json.dumps(said | {"repetition_penalty": 1.1}).encode()}
    own = own_sampling(files)
    assert own == {"greedy": False, "temperature": 0.7, "top_k": 9, "top_p": 0.8} | {
        "max_new_tokens": 3
    }
    assert "repetition_penalty" in caplog.text
    assert own_sampling({"generation_config.json": b'{"do_sample": false}'}) == {"greedy": True}
    assert own_sampling({}) == {}
    path = folder / "generation_config.json"
    path.write_text(json.dumps(said))
    try:
        [[one]] = shardwise.generate(folder, "hi", sampling={})
        assert len(one.completion.token_ids) <= 3
        expected = Sampling(temperature=0.7, top_k=9, top_p=0.8, max_new_tokens=2)
        [[given]] = shardwise.generate(folder, "hi", sampling={"max_new_tokens": 2})
        assert [[given]] == shardwise.generate(folder, "hi", sampling=expected)
    finally:
        path.unlink()


def test_adapters_over_one_base_by_name(folder: Path, tmp_path: Path) -> None:
    """Each completes as its merged model does; the base is read once."""
    config, named = registry.from_hf(folder)
    weights, width = dict(named), config.hidden_size
    expected, folders = {}, {}
    for seed, name in enumerate(("warm", "cold")):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(4, width, generator=g), torch.randn(width, 4, generator=g)
        adapter = PeftAdapter({"layers.1.attn.o": Update(a, b, alpha=8.0)}, rslora=False)
        folders[name] = tmp_path / name
        write(folders[name], adapter, config)
        merged = weights | {"layers.1.attn.o.weight": weights["layers.1.attn.o.weight"] + 2 * b @ a}
        alone = tmp_path / f"{name}-merged"
        registry.to_hf(alone, config, merged.items())
        ByteTokenizer(chat_template=TEMPLATE).save(alone)
        sampling = Sampling(max_new_tokens=5)
        expected[name] = shardwise.generate(alone, ["hi", "ho"], sampling=sampling)
    found = shardwise.generate(folder, ["hi", "ho"], sampling=sampling, adapters=folders)
    said = [[(one.adapter, one.text) for one in group] for group in found]
    assert said == [[(n, expected[n][i][0].text) for n in folders] for i in range(2)]
    assert said[0][0][1] != said[0][1][1]
