"""`shardwise.evaluate`: on this process, on torchrun's ranks, or on ranks that share a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.errors import UserError
from shardwise.launch.together import RESULT, is_rank, start
from shardwise.stages.evaluate import evaluate as on_ranks


def evaluate(
    ckpt: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    precision: str | None = None,
    tp: int = 1,
) -> dict[str, Any]:
    """Run ``evaluations`` (as a recipe has them) on a model's weights; flat figures.

    ``ckpt``: a checkpoint or a folder of them (its latest), a Hugging Face or PEFT folder, a GGUF
    file, or ``hf:org/name``. Without ``evaluations``: those of the recipe that a run's checkpoint
    carries, whose tokenizer comes with it; documents and problems from where the recipe says.
    ``adapters``, by a name of your choice, are folders of PEFT's: each is measured over the one
    base in ``ckpt``, and the figures come by name. ``precision``: fp32 or bf16; None: the recipe's,
    else fp32. ``tp``: ranks that share the model, started here; under torchrun, as many neighbours
    of its ranks, and the others are data parallel. Raises UserError when it is not said what to
    measure, and for what cannot be.
    """
    if tp < 1:
        raise UserError(f"tp {tp}: at least one rank is needed")
    if tp == 1 or is_rank():
        return on_ranks(ckpt, adapters, evaluations, precision, tp)
    asked = json.loads(json.dumps(list(evaluations), default=str))  # paths as text
    over = {name: str(path) for name, path in (adapters or {}).items()}
    said = {"ckpt": str(ckpt), "adapters": over, "evaluations": asked}
    said |= {"precision": precision, "tp": tp}
    found: dict[str, Any] = start(f"{__name__}:_rank", said, tp)
    return found


def _rank(said: dict[str, Any], folder: str) -> None:
    found = on_ranks(**said)
    import torch.distributed as dist

    if dist.get_rank() == 0:
        (Path(folder) / RESULT).write_text(json.dumps(found))
