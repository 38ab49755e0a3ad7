"""Bugs to plant as edits of the source: in what optimizers keep, and how ranks share it.

See `edited_bugs` for the fields.
"""

from __future__ import annotations

from typing import Any

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

OPTIMIZER_BUGS = Table()
add = OPTIMIZER_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}
PARTS, RULE = "optimizer in parts", "optimizer's rule"
ALONE = "optimizer|native|alone"


def of(kind: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, "optimizer.kind": kind, **more}


# --- what needs the whole tensor ----------------------------------------------------------------

add(
    "newton_schulz_on_a_shard",
    PARTS, "llama pretrain dp2.zero2", "dp", "weight",
    Edit("optim/muon.py", "if not parts.holders(param):", "if parts.holders(param) is not None:"),
    changes=of("muon"), seen="the reason why Muon's first versions refused FSDP",
)  # fmt: skip
add(
    "muons_size_by_the_local_shape",
    PARTS, "llama pretrain tp2", "tp", "weight",
    Edit("optim/muon.py",
         "size_factor(param.shape[0], param.shape[1], config.scale)",
         "size_factor(weight.shape[0], weight.shape[1], config.scale)"),
    changes=of("muon"),
)  # fmt: skip
add(
    "adafactors_mean_over_the_local_rows",
    PARTS, "llama pretrain dp2.zero1", "dp", "moment|col_var",
    Edit("optim/factored.py",
         "column.lerp_(parts.total(square.sum(0, keepdim=True), param, 0).div_(rows), fresh)",
         "column.lerp_(square.mean(0, keepdim=True), fresh)"),
    changes=of("adafactor"),
)  # fmt: skip
add(
    "adafactors_mean_over_the_local_columns",
    PARTS, "llama pretrain tp2", "tp", "moment|row_var",
    Edit("optim/factored.py",
         "row.lerp_(parts.total(square.sum(1, keepdim=True), param, 1).div_(columns), fresh)",
         "row.lerp_(square.mean(1, keepdim=True), fresh)"),
    changes=of("adafactor"),
)  # fmt: skip
add(
    "adafactors_mean_of_rows_that_ranks_share",
    PARTS, "llama pretrain tp2", "tp", "weight",
    Edit("optim/factored.py",
         "mean = parts.total(row.sum(), param, 0) / rows",
         "mean = parts.total(row.sum(), param) / rows"),
    changes=of("adafactor"),
)  # fmt: skip
add(
    "adafactors_size_of_the_local_part",
    PARTS, "llama pretrain dp2.zero3", "dp", "weight",
    Edit("optim/factored.py",
         "parts.total(own.square().sum(), param).item() / param.numel()",
         "own.square().sum().item() / max(1, own.numel())"),
    changes=of("adafactor"),
)  # fmt: skip
add(
    "eight_bit_blocks_of_each_ranks_part",
    PARTS, "llama pretrain dp2.zero2.tp2", "dp|tp", "moment|absmax",
    Edit("optim/blockwise.py",
         "parts.flat_index(param)",
         "torch.arange(weight.numel()).view(weight.shape)"),
    changes=of("adamw8bit"),
)  # fmt: skip
add(
    "eight_bit_magnitudes_of_the_own_part_alone",
    PARTS, "llama pretrain tp2", "tp", "moment|absmax",
    Edit("optim/blockwise.py", "    parts.maximum(absmax, param)\n", ""),
    changes=of("adamw8bit"),
)  # fmt: skip
add(
    "eight_bit_from_a_local_size_on",
    PARTS, "llama pretrain dp2.zero1", "dp", "moment|run|weight",
    Edit("optim/blockwise.py",
         "if param.numel() < LEAST:",
         "if parts.local_tensor(param.detach()).numel() < LEAST:"),
    changes=of("adamw8bit"),
)  # fmt: skip
add(
    "partial_gradients_moved_by_before_they_are_summed",
    PARTS, "llama pretrain tp2.sp", "sp|tp", "weight|optim/fused",
    Edit("optim/fused.py", "if not waits(param):", "if waits is not None:"),
    changes={"batch.global_batch": 8, "batch.micro_batch": 8, "optimizer.kind": "lomo",
             "engine.max_grad_norm": 0.0},
)  # fmt: skip

# --- the rules themselves -----------------------------------------------------------------------

add(
    "lions_sign_of_the_wrong_moment",
    RULE, "llama pretrain dp2.zero1", ALONE, "weight",
    Edit("optim/lion.py",
         "m.lerp(grad, 1 - self.config.beta1).sign_()",
         "m.lerp(grad, 1 - self.config.beta2).sign_()"),
    changes=of("lion"),
)  # fmt: skip
add(
    "decay_applied_to_norms",
    RULE, "llama pretrain tp2", ALONE, "weight",
    Edit("config/optimizers.py",
         "            return 0.0\n        group = self.group_of(name)",
         "            return self.weight_decay\n        group = self.group_of(name)"),
    changes=of("lion", **{"optimizer.weight_decay": 1.0}),
)  # fmt: skip
add(
    "schedule_free_gradients_at_the_average",
    RULE, "llama pretrain dp2.zero2", ALONE, "weight|loss|gradient",
    Edit("optim/schedule_free.py",
         "weight.lerp_(z, 1 - self.config.beta1)",
         "weight.lerp_(z, 0.0)"),
    changes=of("schedule_free", **{"optimizer.lr": 1e-2}),
)  # fmt: skip
add(
    "orthogonalised_once_too_little",
    RULE, "llama pretrain tp2", ALONE, "weight",
    Edit("optim/muon.py", "for _ in range(steps):", "for _ in range(steps - 1):"),
    changes=of("muon"),
)  # fmt: skip

# --- groups -------------------------------------------------------------------------------------

GROUPS = [{"match": "layers.*.attn.*", "lr_scale": 4.0}]
add(
    "rate_of_a_group_dropped_under_pp",
    "parameter groups", "llama pretrain pp2", ALONE + "|pp", "weight",
    Edit("optim/build.py",
         '{"params": params, "lr_scale": lr_scale,',
         '{"params": params, "lr_scale": 1.0,'),
    changes=of("adamw", **{"optimizer.groups": GROUPS}),
)  # fmt: skip
add(
    "last_group_that_matches_counts",
    "parameter groups", "llama pretrain dp2.zero1", ALONE, "weight",
    Edit("config/optimizers.py",
         "next((g for g in self.groups if",
         "next((g for g in self.groups[::-1] if"),
    changes=of("adamw", **{"optimizer.groups": [*GROUPS, {"match": "*", "lr_scale": 0.5}]}),
)  # fmt: skip

# --- resume -------------------------------------------------------------------------------------

SAVED = {"checkpoint.every": 1}


def left_out(name: str, key: str, layout: str, kind: str) -> None:
    add(
        name,
        "resume", f"llama pretrain {layout}", "resume", "resume|moment|weight",
        Edit("optim/build.py",
             "        if isinstance(value, Tensor)\n    }",
             f'        if isinstance(value, Tensor) and not key.endswith("{key}")\n    }}'),
        changes=of(kind, **SAVED), blind=True,
    )  # fmt: skip


left_out("average_of_schedule_free_not_resumed", "weight_sum", "dp2.zero1", "schedule_free")
left_out("magnitudes_of_eight_bit_blocks_not_resumed", "absmax", "dp2.zero2", "adamw8bit")
left_out("columns_of_adafactor_not_resumed", "col_var", "tp2", "adafactor")
