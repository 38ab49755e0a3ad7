"""`shardwise.generate`: completions from a checkpoint, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from shardwise.checkpoint.convert import OpenModel, open_model
from shardwise.data.chat import encode_chat
from shardwise.data.conversation import Message
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import UserError
from shardwise.models import travel
from shardwise.ops import rng
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.scheduler import Completion, Request

Prompt = str | Sequence[Message]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Generated:
    """One completion: its text without special tokens, and all of its numbers."""

    text: str
    completion: Completion


def generate(
    ckpt: Path | str,
    prompts: Prompt | Sequence[Prompt],
    *,
    sampling: Sampling | None = None,
    num_samples: int = 1,
    raw: bool = False,
    system: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    max_slots: int = 64,
) -> list[list[Generated]]:
    """``num_samples`` completions of every prompt, by prompt.

    A prompt is a text or a conversation (messages with role and content). A text becomes a user's
    message when the tokenizer has a chat template, unless ``raw``: it is then continued exactly as
    it is, special tokens in it included.
    The same seed gives the same completions. Raises UserError, or CheckpointError when the
    checkpoint cannot be read.
    """
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    batch: Sequence[Prompt] = [prompts] if single else prompts  # type: ignore[list-item, assignment]
    model = open_model(ckpt)
    tokenizer = _tokenizer(model, ckpt)
    sampling = (sampling or Sampling()).stopping_at(tokenizer.stop_ids)
    requests = [
        Request(i, encode_prompt(tokenizer, prompt, raw=raw, system=system), num_samples)
        for i, prompt in enumerate(batch)
    ]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config = model.config
    if config.vocab_size == 0:  # a recipe's "the tokenizer's size"
        config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    generator = Generator(
        config, _DTYPES[precision], device, max_slots, decode_text=tokenizer.decode
    )
    generator.load(model.tensors, hf_names=False)
    completions = generator.generate(requests, sampling, rng.key(seed, "generate"))
    grouped: list[list[Generated]] = [[] for _ in batch]
    for completion in completions:
        text = tokenizer.decode(completion.token_ids)
        grouped[completion.prompt_id].append(Generated(text, completion))
    return grouped


def encode_prompt(
    tokenizer: Tokenizer, prompt: Prompt, *, raw: bool = False, system: str | None = None
) -> list[int]:
    """The ids that a model continues; see `generate`."""
    if isinstance(prompt, str) and (raw or tokenizer.chat_template is None):
        if system is not None:
            raise UserError("a system message needs a chat template: leave out --raw, or --system")
        # As it is written: a beginning-of-text token too, if the model wants one, is the user's.
        return tokenizer.encode(prompt, allow_special=True)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return encode_chat(tokenizer, messages, add_generation_prompt=True)[0]


def _tokenizer(model: OpenModel, ckpt: Path | str) -> Tokenizer:
    if not model.has_tokenizer:
        raise UserError(f"{ckpt}: comes without a tokenizer; put tokenizer.json beside the weights")
    with tempfile.TemporaryDirectory() as folder:
        travel.write(Path(folder), model.files)
        return load_tokenizer(folder)
