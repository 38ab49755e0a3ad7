"""`shardwise.generate` on a folder: chat by default, raw on demand, reproducible."""

from __future__ import annotations

from pathlib import Path

import pytest

import shardwise
from shardwise.data.chat import render
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import UserError
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.rollout.api import encode_prompt
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
