"""Bugs of Megatron-core, as edits of the installed release or of our side of it; see `engine_bugs`.

Some are relatives of what its tracker holds (gradients of norms that no tensor rank sums, a tied
embedding whose copies drift apart, a batch divided by its tokens where sums were asked for). The
rest are its silent faults with our mend switched off.
"""

from __future__ import annotations

from typing import Any

from tests.verify.edits import Edit
from tests.verify.engine_bugs import BUGS, EngineBug

LIBRARY = "megatron.core"
BUFFERS, HOOKS = "distributed/param_and_grad_buffer.py", "distributed/distributed_data_parallel.py"
FINALIZE, LAYERS = "distributed/finalize_model_grads.py", "tensor_parallel/layers.py"
NORM, DEALT_OUT = "optimizer/optimizer.py", "optimizer/distrib_optimizer.py"
OURS = ("model", "names", "engine", "optimizer", "core_engine")
MODEL, NAMES, ENGINE, OPTIMIZER, CORE = (f"engines/megatron/{x}.py" for x in OURS)


def megatron(
    name: str,
    layout: str,
    precision: str,
    named: str,
    *edits: tuple[str, ...],
    whole: bool = False,
    **keys: Any,
) -> None:
    """Add one: edits of megatron-core's files, or of ours where a fourth word says so."""
    made = tuple(Edit(*edit) if len(edit) == 4 else Edit(*edit, LIBRARY) for edit in edits)
    BUGS[name] = EngineBug("megatron", layout, precision, named, made, tuple(keys.items()), whole)


# --- sums over data ranks, and over micro-batches -------------------------------------------------

megatron(
    "megatrons_data_ranks_average", "dp2", "fp32", "gradient update 1",
    (HOOKS, "            gradient_scaling_factor = 1.0\n"
     "            expert_gradient_scaling_factor = 1.0\n        else:",
     "            gradient_scaling_factor = 1.0 / self.dp_cp_group.size()\n"
     "            expert_gradient_scaling_factor = 1.0\n        else:"),
)  # fmt: skip
megatron(
    "megatrons_data_ranks_keep_their_own", "dp2.zero0", "fp32", "gradient update 1",
    (BUFFERS, "        if not self.ddp_config.overlap_grad_reduce:\n"
     "            self.start_grad_sync(force_all_reduce=force_all_reduce)\n            return\n",
     "        if not self.ddp_config.overlap_grad_reduce:\n            return\n"),
)  # fmt: skip
megatron(
    "megatron_keeps_the_last_micro_batch", "tp2", "fp32", "gradient update 1",
    (HOOKS, "param.main_grad.add_(param.grad.data)", "param.main_grad.copy_(param.grad.data)"),
)  # fmt: skip
megatron(
    "megatron_divides_by_tokens_once_more", "pp2", "fp32", "gradient update 1",
    (ENGINE, "    del num_tokens\n    finalize_model_grads(model, None, **options)",
     "    finalize_model_grads(model, num_tokens, **options)", "shardwise"),
)  # fmt: skip
megatron(
    "megatrons_buffers_are_never_emptied", "dp2", "fp32", "gradient update 2",
    (ENGINE, "            part.zero_grad_buffer()\n", "            part.eval()\n", "shardwise"),
)  # fmt: skip
megatron(
    "megatron_sums_gradients_in_bf16", "dp2", "bf16", "BFloat16|bfloat16|in 16 bits",
    (ENGINE, "wide = self.precision.gradients == torch.float32", "wide = False", "shardwise"),
)  # fmt: skip

# --- tensor and sequence parallelism --------------------------------------------------------------

megatron(
    "megatrons_norms_are_not_marked", "tp2.sp", "fp32", "gradient update 1 .*norm",
    (MODEL, "parameter.sequence_parallel = config.sequence_parallel",
     "parameter.sequence_parallel = False", "shardwise"),
)  # fmt: skip
megatron(
    "a_tensor_rank_keeps_its_own_input_gradient", "tp2", "fp32", "gradient update 1",
    (LAYERS, "torch.distributed.all_reduce(grad_input, group=tp_group, async_op=True)",
     "torch.distributed.all_reduce(grad_input.clone(), group=tp_group, async_op=True)"),
)  # fmt: skip
megatron(
    "words_of_other_ranks_are_looked_up", "tp2", "fp32", "loss update 1",
    (LAYERS, "            output_parallel[input_mask, :] = 0.0\n",
     "            output_parallel[input_mask, :] *= 1.0\n"),
)  # fmt: skip
megatron(
    "keys_and_values_are_exchanged", "tp2", "fp32", "loss update 1",
    (NAMES, "        return self._grouped(fused)[:, self.shared]\n",
     "        return self._grouped(fused)[:, self.shared + 1]\n", "shardwise"),
    (NAMES, "        \"\"\"Of each group the last.\"\"\"\n"
     "        return self._grouped(fused)[:, self.shared + 1]\n",
     "        \"\"\"Of each group the last.\"\"\"\n"
     "        return self._grouped(fused)[:, self.shared]\n", "shardwise"),
)  # fmt: skip

# --- pipelines ------------------------------------------------------------------------------------

megatron(
    "copies_of_a_tied_embedding_drift_apart", "pp2", "fp32", "gradient update 1 embed",
    (FINALIZE, "    _allreduce_word_embedding_grads(model, config, embd_group, pp_group)\n",
     "    (model, config, embd_group, pp_group)\n"),
)  # fmt: skip
megatron(
    "two_messages_are_taken_for_each_other", "pp2.v2.interleaved", "fp32", "update 1",
    (MODEL, "\"batch_p2p_comm\": not interleaved,\n            \"overlap_p2p_comm\": interleaved,",
     "\"batch_p2p_comm\": True,\n            \"overlap_p2p_comm\": False,", "shardwise"),
)  # fmt: skip

# --- what computes is not what was updated --------------------------------------------------------

megatron(
    "megatron_computes_with_its_first_weights", "dp2.zero0", "fp32", "loss update 2",
    (ENGINE, "        names.load(self.places, weights, self.mesh)\n",
     "        if not self.updates:\n"
     "            names.load(self.places, weights, self.mesh)\n", "shardwise"),
    optimizer="native",
)  # fmt: skip
megatron(
    "weights_of_other_data_ranks_are_stale", "dp2.zero1", "fp32", "loss update 2",
    (DEALT_OUT, "                for model_chunk in self.model_chunks:\n"
     "                    model_chunk.start_param_sync()\n        if timers",
     "                pass\n        if timers"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "bf16_weights_do_not_follow_their_masters", "dp2.zero0", "bf16",
    "copy of .* is not the weight|loss update 2",
    (NORM, "            else:\n                self._copy_main_params_to_model_params()\n",
     "            else:\n                pass\n"),
    optimizer="megatron",
)  # fmt: skip

# --- Megatron's own optimizer ---------------------------------------------------------------------

megatron(
    "its_norm_leaves_out_other_ranks_shards", "dp2.zero1", "fp32", "clip norm update 1",
    (OPTIMIZER, "groups.intra_dist_opt = mesh.groups[\"all\"]",
     "groups.intra_dist_opt = mesh.groups[\"tp\"]", "shardwise"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "its_norm_takes_cut_weights_for_copies", "tp2", "fp32", "clip norm update 1",
    (NAMES, "place.parameter.tensor_model_parallel = cut ",
     "place.parameter.tensor_model_parallel = False ", "shardwise"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "its_norm_counts_a_tied_embedding_twice", "pp2", "fp32", "clip norm update 1",
    (NORM, "if grad_not_none and is_not_shared and is_not_tp_duplicate:",
     "if grad_not_none and is_not_tp_duplicate:"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "the_last_groups_decay_is_everyones", "dp2.zero1", "fp32", "weight update 1 (embed|.*norm)",
    (DEALT_OUT, "self.optimizer.param_groups = [g[\"orig_group\"] for g in self.opt_group_ranges]",
     "last = self.opt_group_ranges[-1][\"orig_group\"][\"weight_decay\"]\n"
     "            self.optimizer.param_groups = [\n"
     "                {**g[\"orig_group\"], \"weight_decay\": last}\n"
     "                for g in self.opt_group_ranges]"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "a_stretch_meets_the_gradient_of_another", "dp2.zero1", "fp32",
    "moment update 1|weight update 1|clip norm update 1",
    (DEALT_OUT, "model_grad.view(-1)[param_range.start : param_range.end]",
     "model_grad.view(-1)[: param_range.size]"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "its_masters_start_as_bf16_rounds_them", "dp2.zero1", "bf16", "initial .* error",
    (CORE, "init_tensor(n, s, h, setup.seed, rows)",
     "init_tensor(n, s, h, setup.seed, rows).bfloat16()", "shardwise"),
    optimizer="megatron",
)  # fmt: skip
megatron(
    "it_applies_a_nan", "dp2.zero1", "bf16", "by a NaN",
    (OPTIMIZER, "        if math.isfinite(norm):\n", "        if not overflows:\n", "shardwise"),
    whole=True, optimizer="megatron",
)  # fmt: skip
