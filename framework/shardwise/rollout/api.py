"""Completions from a checkpoint, a Hugging Face folder or a GGUF file."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.adapters import peft, peft_read
from shardwise.checkpoint.convert import OpenModel, open_model
from shardwise.config.schema import ModelConfig
from shardwise.data.chat import encode_chat
from shardwise.data.conversation import Message
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import UserError
from shardwise.models import travel
from shardwise.models.common.config import DecoderConfig
from shardwise.ops import rng
from shardwise.parallel.mesh import Mesh, init_distributed, pick_device
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Completion, Request
from shardwise.rollout.sharded import check_tp, group_mesh

log = logging.getLogger(__name__)

Prompt = str | Sequence[Message]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Generated:
    """One completion: its text without special tokens, and all of its numbers.

    ``adapter``: the name of the one that the base model had.
    """

    text: str
    completion: Completion
    adapter: str | None = None


def generate(
    ckpt: Path | str,
    prompts: Prompt | Sequence[Prompt],
    *,
    sampling: Sampling | Mapping[str, Any] | None = None,
    num_samples: int = 1,
    raw: bool = False,
    system: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    seed: int = 0,
    max_slots: int = 64,
    adapters: Mapping[str, Path | str] | None = None,
    tp: int = 1,
) -> list[list[Generated]]:
    """See `shardwise.generate`, whose work this is; ``tp``: among ranks that all call it."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    batch: Sequence[Prompt] = [prompts] if single else prompts  # type: ignore[list-item, assignment]
    model = open_model(ckpt)
    tokenizer = _tokenizer(model, ckpt)
    if not isinstance(sampling, Sampling):
        base = {} if sampling is None else {"greedy": True, "max_new_tokens": 128}
        sampling = Sampling(**(base | own_sampling(model.files) | dict(sampling or {})))
    sampling = sampling.stopping_at(tokenizer.stop_ids)
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
        config,
        _DTYPES[precision],
        device,
        max_slots,
        decode_text=tokenizer.decode,
        adapter=None if adapters else model.beside,
        mesh=shared_mesh(config, tp, device),
    )
    grouped: list[list[Generated]] = [[] for _ in batch]
    for name, weights in served(config, model, adapters or {}):
        generator.update_weights(weights, hf_names=False)
        for completion in generator.generate(requests, sampling, rng.key(seed, "generate")):
            text = tokenizer.decode(completion.token_ids)
            grouped[completion.prompt_id].append(Generated(text, completion, name))
    return grouped


def shared_mesh(config: ModelConfig, tp: int, device: str) -> Mesh | None:
    """Of ``tp`` ranks, the world, that share a generator; a collective call. None: one rank.

    Raises ConfigError, a UserError, for a model whose heads so many ranks cannot share.
    """
    if tp == 1:
        return None
    init_distributed(place := pick_device(device))
    assert isinstance(config, DecoderConfig)
    check_tp(tp, config, dist.get_world_size(), "--tp")
    return group_mesh(tp, place)


def served(
    config: ModelConfig, model: OpenModel, folders: Mapping[str, Path | str]
) -> Iterator[tuple[str | None, Iterable[tuple[str, Tensor]]]]:
    """The weights to compute with, by the adapter's name: the base's where there is none.

    ``folders``: adapters of PEFT's by name. Raises CheckpointError for one of another base.
    """
    if not folders:
        yield None, model.parts
        return
    assert isinstance(config, DecoderConfig)
    adapters = {name: peft_read.read(folder, config) for name, folder in folders.items()}
    weights = dict(model.tensors)  # one copy for all of them
    for name, adapter in adapters.items():
        peft_read.check_base(adapter, folders[name], weights)
        yield name, peft.merge(weights.items(), adapter)


# Of a generation_config.json, what is not done here, and the values that ask for nothing.
_UNSERVED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "stop_strings": (None, []),
}


def own_sampling(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Fields of `Sampling` by the generation_config.json that came with a model.

    Warns of what it asks for and is not done here.
    """
    said = travel.generation(files)
    if unserved := [k for k, ok in _UNSERVED.items() if said.get(k) not in ok]:
        log.warning("generation_config.json asks for %s, not done here", ", ".join(unserved))
    names = ["max_new_tokens"]
    own: dict[str, Any] = {}
    if "do_sample" in said:
        own["greedy"] = not said["do_sample"]
        names += ["temperature", "top_k", "top_p"] if said["do_sample"] else []
    return own | {name: said[name] for name in names if said.get(name) is not None}


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
