"""A model and its optimizer as a universal checkpoint of DeepSpeed's, under transformers' names.

A DeepSpeed engine on any number of ranks reads it (``checkpoint: {load_universal: true}``),
with ZeRO 1 to 3. What it finds out about itself (learning rates, decay) it takes from its own
config: groups here say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shardwise.checkpoint.deepspeed import MASTER
from shardwise.checkpoint.optimizer_state import OptimizerState
from shardwise.checkpoint.pickles.write import write as write_archive
from shardwise.errors import UserError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # the states that DeepSpeed looks for
RELEASE = "0.19.8"  # whose form this is
# Its name, whether weights are whole in the engine that reads it, or cut (ZeRO 3).
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write(
    folder: Path,
    config: DecoderConfig,
    weights: Iterator[tuple[str, Tensor]],
    state: OptimizerState | None,
) -> None:
    """Fill a folder. Without ``state`` the optimizer is as before its first update.

    Raises UserError for an optimizer that is none of Adam's kind.
    """
    if state is not None and (set(state.kinds) != set(MOMENTS) or state.updates is None):
        raise UserError(
            f"its optimizer keeps {', '.join(state.kinds)}, and a universal checkpoint of "
            "DeepSpeed's holds Adam's exp_avg and exp_avg_sq; convert the model to hf first for "
            "the weights alone"
        )
    steps, updates = (state.steps, state.updates) if state else (0, 0)
    tag = f"global_step{steps}"
    step = torch.tensor(float(updates or 0))
    shapes: dict[str, torch.Size] = {}
    for name, tensor in registry.to_hf_tensors(config, weights):
        shapes[name] = tensor.shape
        _put(folder / tag, name, MASTER, tensor)
        write_archive(folder / tag / "zero" / name / "step.pt", step)
    for kind in MOMENTS:
        written = set()
        for name, tensor in registry.to_hf_tensors(config, state.of(kind)) if state else ():
            _put(folder / tag, name, kind, tensor)
            written.add(name)
        for name in shapes.keys() - written:
            _put(folder / tag, name, kind, torch.zeros(shapes[name]))
    _common(folder / tag, step, shapes, (steps, state.skipped if state else 0))
    for pointer in ("latest", "latest_universal"):
        (folder / pointer).write_text(tag)


def _put(folder: Path, name: str, kind: str, tensor: Tensor) -> None:
    write_archive(folder / "zero" / name / f"{kind}.pt", {"param": tensor.float(), "cat_dim": 0})


def _common(
    folder: Path, step: Tensor, shapes: Mapping[str, torch.Size], counts: tuple[int, int]
) -> None:
    # As many groups as there may be, each of which says nothing.
    groups: list[dict[str, object]] = [{} for _ in shapes]
    optimizer = {
        "ds_version": RELEASE,
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups[:1]},
    }
    write_archive(folder / "zero" / "optimizer_state.pt", optimizer)
    model = {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [dict(shapes)],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "global_steps": counts[0],
        "skipped_steps": counts[1],
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": RELEASE,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }
    for name in MODEL_FILES:
        write_archive(folder / name, model)
