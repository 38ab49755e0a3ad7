"""What the gate reads: figures of the base, the version that is served and the new one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise import checkpoint
from shardwise.adapters import peft, peft_read
from shardwise.checkpoint.convert import RUN_FILE, OpenModel, open_model
from shardwise.config.start import located
from shardwise.config.yaml12 import parse
from shardwise.data.chat import encode_chat
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.models import registry, travel
from shardwise.models.common.config import DecoderConfig
from shardwise.rollout.api import generate
from shardwise.rollout.config import Sampling
from shardwise.serve.feedback import Task
from shardwise.serve.gate import FedBack
from shardwise.stages.evaluate import evaluate

# Shape suffixes: T tokens, V vocabulary.


def tokenizer_of(model: OpenModel) -> Tokenizer:
    """The tokenizer that came with a model."""
    with tempfile.TemporaryDirectory() as folder:
        travel.write(Path(folder), model.files)
        return load_tokenizer(folder)


def fed_back(
    ckpt: Path | str, adapter: Path | None, tasks: Sequence[Task], max_new_tokens: int
) -> FedBack:
    """Greedy answers and bits, on those of ``tasks`` that have a good answer."""
    tasks = [task for task in tasks if task.good]
    sampling = Sampling(greedy=True, max_new_tokens=max_new_tokens)
    folders = None if adapter is None else {"now": adapter}
    prompts = [task.messages for task in tasks]
    groups = generate(ckpt, prompts, sampling=sampling, adapters=folders)
    right = [g[0].text.strip() in task.good for g, task in zip(groups, tasks, strict=True)]
    nll, count = _nll(ckpt, adapter, tasks)
    return FedBack(sum(right) / len(right), nll / math.log(2) / count, len(tasks))


@torch.no_grad()
def _nll(ckpt: Path | str, adapter: Path | None, tasks: Sequence[Task]) -> tuple[float, int]:
    """Summed -log p of the good answers' tokens in nats, and how many tokens that are."""
    opened = open_model(ckpt)
    tokenizer = tokenizer_of(opened)
    config = opened.config
    assert isinstance(config, DecoderConfig)
    if config.vocab_size == 0:
        config = config.model_copy(update={"vocab_size": tokenizer.vocab_size})
    weights: dict[str, Tensor] = dict(opened.tensors)
    if adapter is not None:
        weights = dict(peft.merge(weights.items(), peft_read.read(adapter, config)))
    model = registry.build(config).eval().requires_grad_(False)
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    total, count = 0.0, 0
    for task in tasks:
        for text in task.good:
            said = [*task.messages, {"role": "assistant", "content": text}]
            ids, mask = encode_chat(tokenizer, said, learn=[False] * len(task.prompt) + [True])
            ids_1T = torch.tensor(ids)[None]
            logits_TV = model(ids_1T[:, :-1], torch.arange(len(ids) - 1)[None])[0]
            logp_T = logits_TV.double().log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0]
            total -= float(logp_T[torch.tensor(mask[1:])].sum())
            count += sum(mask[1:])
    return total, count


def probe(
    ckpt: Path | str, adapter: Path | None, texts: Sequence[Path], seq_len: int
) -> dict[str, Any]:
    """Figures on what users did not say: see `evaluations_of`."""
    asked = evaluations_of(ckpt, texts, seq_len)
    found = evaluate(ckpt, None if adapter is None else {"now": str(adapter)}, asked)
    figures = found if adapter is None else found["now"]
    return {k: v for k, v in figures.items() if isinstance(v, int | float)}


def evaluations_of(
    ckpt: Path | str, texts: Sequence[Path], seq_len: int
) -> list[Mapping[str, Any]]:
    """Bits on held-out text, and the tasks of the stages before, as a recipe's evaluations.

    Text: ``texts``; else what the checkpoint's recipe measured bits on; else the validation part of
    what it trained on, or of the standard library. Tasks: those of the checkpoint's recipe.
    """
    recipe: dict[str, Any] = {}
    place = located(ckpt)
    if (place / "manifest.json").exists() or checkpoint.latest(place) is not None:
        files = checkpoint.read_files(place := checkpoint.resolve(place))
        if RUN_FILE in files:
            recipe = parse(files[RUN_FILE].decode(), f"{place}/{RUN_FILE}").data
    found: list[Mapping[str, Any]] = []
    for said in recipe.get("evaluations") or []:
        if said["kind"] != "continuations" and not (texts and said["kind"] == "bits_per_byte"):
            found.append({key: value for key, value in said.items() if key != "stages"})
    if not any(one["kind"] == "bits_per_byte" for one in found):
        bits: dict[str, Any] = {"kind": "bits_per_byte", "seq_len": seq_len, "stride": seq_len // 2}
        if texts:
            bits["data"] = {"validation": [{"kind": "text", "path": str(t)} for t in texts]}
        found.insert(0, {**bits, "name": "probe"})
    return found
