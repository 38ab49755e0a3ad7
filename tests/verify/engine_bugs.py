"""Bugs of other engines: edits of an installed release, or of a mend of ours for what it does.

Each is one that trackers of these engines hold, or a near relative, put where the installed release
has the line. An edit that no longer fits says so: the release is another one.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

from shardwise.verify import suite
from tests.verify.edits import Edit

ENGINE = "engines/deepspeed/engine.py"
ZERO12, ZERO3 = "runtime/zero/stage_1_and_2.py", "runtime/zero/stage3.py"


@dataclasses.dataclass(frozen=True)
class EngineBug:
    """One of a kind of engine. ``named``: what verify's sentence must say, a pattern."""

    engine: str
    layout: str
    precision: str
    named: str
    edits: tuple[Edit, ...]
    keys: tuple[tuple[str, Any], ...] = ()  # of the engine's own
    whole: bool = False  # whether it shows behind the updates alone

    def recipe(self) -> dict[str, Any]:
        """The suite's pre-training, with two micro-batches a data rank."""
        stage = copy.deepcopy(suite.STAGES["pretrain"])
        stage["batch"] = {"global_batch": 8, "micro_batch": 2, "seq_len": 64}
        stage["engine"] = {"kind": self.engine, "precision": self.precision, **dict(self.keys)}
        return {**suite.recipe("llama"), "stages": [stage]}

    def is_named_in(self, sentence: str) -> bool:
        """Whether the right thing is told."""
        return re.search(self.named, sentence) is not None


BUGS: dict[str, EngineBug] = {}


def deepspeed(name: str, layout: str, precision: str, named: str, *edits: tuple[str, ...]) -> None:
    """Add one: edits of deepspeed's files, or of ours where a fourth word says so."""
    made = tuple(Edit(*edit) if len(edit) == 4 else Edit(*edit, "deepspeed") for edit in edits)
    BUGS[name] = EngineBug("deepspeed", layout, precision, named, made)


# --- sums, means and scales ---------------------------------------------------------------------

deepspeed(
    "zero2_averages_twice", "dp2.zero2", "fp32", "gradient update 1",
    (ZERO12,
     "            if self.gradient_average:\n                tensor.div_(dist.get_world_size(",
     "            if self.gradient_average:\n                tensor.div_(2)\n"
     "                tensor.div_(dist.get_world_size("),
)  # fmt: skip
deepspeed(
    "zero0_sums_where_it_should_average", "dp2.zero0", "fp32", "gradient update 1",
    ("runtime/engine.py",
     "tensor_to_allreduce.mul_(self.gradient_predivide_factor() / dp_world_size)",
     "tensor_to_allreduce.mul_(1.0)"),
)  # fmt: skip
deepspeed(
    "our_sum_is_left_to_its_mean", "dp2.zero3", "fp32", "gradient update 1",
    (ENGINE, "backward(objective * self.mesh.layout.world,", "backward(objective,", "shardwise"),
)  # fmt: skip
deepspeed(
    "context_ranks_are_not_counted", "zero2.cp2.ulysses", "fp32", "gradient update 1.*cp2",
    (ENGINE, "backward(objective * self.mesh.layout.world,",
     "backward(objective * self.data_size,", "shardwise"),
)  # fmt: skip
deepspeed(
    "gradients_divided_by_the_loss_scale", "dp2.zero2", "fp32", "weight update 1|moment update 1",
    (ZERO12, "            combined_scale = clip * self.loss_scale\n",
     "            combined_scale = clip * self.loss_scale * 2\n"),
)  # fmt: skip
deepspeed(
    "loss_divided_by_accumulation_steps", "dp2.zero1", "fp32", "gradient update 1",
    ("runtime/engine.py",
     "loss = loss / self.gradient_accumulation_steps() if scale_wrt_gas else loss",
     "loss = loss / 2"),
)  # fmt: skip
deepspeed(
    "a_clamp_that_divides_by_less_than_one", "dp2.zero2", "fp32", "moment update 1|weight update 1",
    (ZERO12, "            clip = torch.clamp(clip, min=1.0)\n",
     "            clip = torch.clamp(clip, max=1.0)\n"),
)  # fmt: skip

# --- norms that leave something out -------------------------------------------------------------

deepspeed(
    "the_norm_leaves_out_a_group", "dp2.zero2", "fp32", "clip norm update 1",
    (ZERO12,
     "in enumerate(self.bit16_groups):\n            if self.cpu_offload:\n                norm =",
     "in enumerate(self.bit16_groups[:-1]):\n            if self.cpu_offload:\n"
     "                norm ="),
)  # fmt: skip
deepspeed(
    "zero3s_norm_leaves_out_a_group", "dp2.zero3", "fp32", "clip norm update 1",
    (ZERO3,
     "in enumerate(self.fp16_groups):\n            if self.offload_optimizer:\n"
     "                norm_groups.append(",
     "in list(enumerate(self.fp16_groups))[1:]:\n            if self.offload_optimizer:\n"
     "                norm_groups.append("),
)  # fmt: skip

# --- micro-batches that are lost or come twice --------------------------------------------------

deepspeed(
    "zero3_loses_the_first_micro_batch", "dp2.zero3", "fp32", "gradient update 1",
    (ZERO3, "            if self.micro_step_id == 0:  # don't accumulate\n",
     "            if self.micro_step_id <= 1:  # don't accumulate\n"),
)  # fmt: skip
deepspeed(
    "zero1_in_bf16_keeps_the_last_micro_batch", "dp2.zero1", "bf16", "gradient update 1",
    ("runtime/bf16_optimizer.py",
     "hp_grad.data.add_(lp.grad.data.to(hp_grad.dtype).view(hp_grad.shape))",
     "hp_grad.data.copy_(lp.grad.data.to(hp_grad.dtype).view(hp_grad.shape))"),
)  # fmt: skip
# --- what computes is not what was updated ------------------------------------------------------

deepspeed(
    "zero3_computes_with_stale_weights", "dp2.zero3", "fp32",
    "copy of .* is not the weight|loss update 2",
    (ZERO3,
     "            self.fp16_partitioned_groups_flat[sub_group_id].data.copy_(\n"
     "                self.fp32_partitioned_groups_flat[sub_group_id].data)\n\n"
     "            #unflatten fp16 parameter subgroup",
     "            self.fp16_partitioned_groups_flat[sub_group_id].data.clone().copy_(\n"
     "                self.fp32_partitioned_groups_flat[sub_group_id].data)\n\n"
     "            #unflatten fp16 parameter subgroup"),
)  # fmt: skip
deepspeed(
    "the_first_groups_decay_is_everyones", "dp2.zero2", "fp32", "weight update 1",
    (ZERO12, "self.optimizer.param_groups = [original_param_groups[group_no]]",
     "self.optimizer.param_groups = [{**original_param_groups[group_no],"
     " 'weight_decay': original_param_groups[0]['weight_decay']}]"),
)  # fmt: skip

# --- rounded where nobody says so ---------------------------------------------------------------

deepspeed(
    "gradients_are_reduced_in_bf16", "dp2.zero2", "bf16", "in 16 bits|reductions|gradient update",
    (ZERO12, "        if communication_data_type != tensor.dtype:\n"
     "            tensor_to_allreduce = tensor.to(communication_data_type)\n\n"
     "        if divide and self.gradient_average:\n            tensor_to_allreduce.div_(",
     "        if False:\n"
     "            tensor_to_allreduce = tensor.to(communication_data_type)\n\n"
     "        if divide and self.gradient_average:\n            tensor_to_allreduce.div_("),
)  # fmt: skip
deepspeed(
    "masters_start_as_bf16_rounds_them", "dp2.zero2", "bf16", "initial .* error",
    (ENGINE,
     "init_tensor(n, s, i, seed, rows))",
     "init_tensor(n, s, i, seed, rows).bfloat16())",
     "shardwise"),
)  # fmt: skip
deepspeed(
    "zero_init_ignores_the_dtype_that_it_is_given", "dp2.zero3", "fp32", "bf16|loss update|float32",
    (ENGINE, "deepspeed.zero.Init(config_dict_or_path=self._json())",
     "deepspeed.zero.Init(config_dict_or_path=self._json(), dtype=computes)",
     "shardwise"),
)  # fmt: skip
