"""`shardwise.generate`: in this process, or on ranks that share the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from shardwise.errors import UserError
from shardwise.launch.together import RESULT, check_world, is_rank, start
from shardwise.rollout import api
from shardwise.rollout.api import Generated, Prompt
from shardwise.rollout.config import Sampling
from shardwise.rollout.sequences import Completion


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
    """``num_samples`` completions of every prompt, by prompt.

    A prompt is a text or a conversation (messages with role and content). A text becomes a user's
    message when the tokenizer has a chat template, unless ``raw``: it is then continued exactly as
    it is, special tokens in it included.
    ``sampling`` as a mapping holds what differs from the model's own generation_config.json, which
    stands before greedy completions of 128 tokens; None: the model's own before `Sampling`'s.
    ``adapters``, by a name of your choice, are folders of PEFT's: each completes every prompt, over
    the one base model in ``ckpt``. ``tp``: ranks that share the model, each with some of its heads;
    started here, or by torchrun, where all of them get the completions.
    The same seed gives the same completions. Raises UserError, or CheckpointError when the
    checkpoint cannot be read.
    """
    said = dict(locals())
    if tp < 1:
        raise UserError(f"tp {tp}: at least one rank is needed")
    if tp > 1 and is_rank():
        check_world(tp)
    elif tp > 1:
        if isinstance(sampling, Sampling):
            said["sampling"] = sampling.model_dump_json()  # whole: nothing of it is a default
        said |= {"ckpt": str(ckpt), "adapters": {n: str(p) for n, p in (adapters or {}).items()}}
        return [[_read(g) for g in group] for group in start(f"{__name__}:_rank", said, tp)]
    return api.generate(**said)


def _rank(said: dict[str, Any], folder: str) -> None:
    if isinstance(said["sampling"], str):
        said["sampling"] = Sampling.model_validate_json(said["sampling"])
    found = api.generate(**said)
    import torch.distributed as dist

    if dist.get_rank() == 0:
        rows = [[dataclasses.asdict(one) for one in group] for group in found]
        (Path(folder) / RESULT).write_text(json.dumps(rows))


def _read(row: dict[str, Any]) -> Generated:
    said = row["completion"]
    said |= {"prompt_tokens": tuple(said["prompt_tokens"])}
    said["policies"] = [tuple(p) for p in said["policies"]]
    return Generated(row["text"], Completion(**said), row["adapter"])
