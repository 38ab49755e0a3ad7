"""Bugs to plant as edits of the source: what large runs, devices or threads alone would meet.

Thresholds that small tensors do not reach, how a device is sharded, what a thread still reads, how
many micro-batches a pipeline holds, evaluations, figures of speed, sums rounded between ranks, what
a stage starts from, and what is no number or has none.
See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

MORE_BUGS = Table()
add = MORE_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}

# --- saving and evaluating ----------------------------------------------------------------------

add(
    "a_thread_saves_what_the_next_update_changes",
    "asynchronous save", "llama pretrain dp2.zero1", "resume", "resume",
    Edit("checkpoint/background.py",
         "            copy.copy_(part.values, non_blocking=on_gpu)\n",
         '            copy = part.values.to("cpu", non_blocking=on_gpu)\n'),
    changes=SMALL | {"checkpoint.asynchronous": True}, blind=True, whole=True,
)  # fmt: skip
add(
    "blocks_after_the_first_read_from_the_wrong_rows",
    "blocks of a checkpoint", "llama pretrain dp2.zero2", "resumed|dp", "resumed|loaded",
    Edit("checkpoint/loading.py",
         "            low, high = (first + start) * row_bytes, (first + start + rows)",
         "            low = (first + start // step) * row_bytes\n"
         "            high = low + rows"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "rows_that_ranks_cannot_share_left_out_of_bits_per_byte",
    "evaluation", "llama pretrain dp2.zero2", "dp", "evaluation|forward pass",
    Edit("stages/bits.py",
         "sum_nll(engine, rows, rows.num_rows, config.micro_batch)",
         "sum_nll(engine, rows, rows.num_rows // engine.data_size * engine.data_size, "
         "config.micro_batch)"),
    changes=SMALL | {"evaluations": [{"kind": "bits_per_byte", "seq_len": 64, "stride": 32}]},
    blind=True, whole=True,
)  # fmt: skip
add(
    "speed_is_held_against_one_ranks_machine",
    "figures of speed", "llama pretrain dp2.zero1", "dp", "fraction_of_gemm",
    Edit("stages/pipeline.py",
         "    return float(sum_over(total, dist.group.WORLD))",
         "    return float(total)"),
    changes=SMALL, blind=True,
)  # fmt: skip

# --- what a small model and a CPU do not meet ---------------------------------------------------

add(
    "blocks_of_a_device_average_their_gradients",
    "sharding of a device", "llama pretrain dp2.zero2", "dp|resumed", "gradient",
    Edit("parallel/data.py",
         "    for module in fsdp_modules(model):\n        module.set_gradient_divide_factor(1.0)",
         "    for module in fsdp_modules(model)[: None if row.reshard_after_forward else 1]:\n"
         "        module.set_gradient_divide_factor(1.0)"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "a_pipelines_buffers_are_used_again_too_soon",
    "pipeline buffers", "llama pretrain pp2.gpipe", "pp", "gradient",
    Edit("engines/native.py",
         "        self.open = dict.fromkeys(engine.chunks, len(cuts))\n",
         "        self.open = dict.fromkeys(engine.chunks, len(cuts))\n"
         "        self.ring: list[Tensor] = []\n"),
    Edit("engines/native.py",
         "        return self.cuts[microbatch].activations(self.engine.precision.compute)",
         "        new = self.cuts[microbatch].activations(self.engine.precision.compute)\n"
         "        if len(self.ring) < 8:\n"
         "            self.ring.append(new)\n"
         "            return new\n"
         "        self.ring.append(self.ring.pop(0))\n"
         "        return self.ring[-1].detach()"),
    changes={"batch.global_batch": 64, "batch.micro_batch": 2, "batch.seq_len": 64},
)  # fmt: skip

# --- sums of 16 bits, which no tolerance tells --------------------------------------------------

add(
    "a_ring_sums_gradients_of_keys_in_bf16",
    "partial sums", "llama pretrain cp2.ring", "cp|ring", "_RingAttention",
    Edit("parallel/context.py",
         "grads = [torch.zeros(t.shape, dtype=wide, device=q.device) for t in held]",
         "grads = [torch.zeros_like(t) for t in held]"),
    changes=SMALL, precision="bf16",
)  # fmt: skip
add(
    "a_ring_merges_outputs_in_bf16",
    "partial sums", "llama pretrain cp2.ring", "cp|ring", "merge",
    Edit("parallel/context.py",
         "out = torch.zeros(q.shape, dtype=wide, device=q.device)",
         "out = torch.zeros_like(q)"),
    changes=SMALL, precision="bf16",
)  # fmt: skip
add(
    "a_cut_vocabularys_sums_travel_in_bf16",
    "partial sums", "llama pretrain tp2", "tp", "_TokenLogprobs",
    Edit("ops/cross_entropy.py",
         "sum_N, picked_N = comm.all_reduce(both_2N, shard.group, \"tp\")",
         "both_2N = comm.all_reduce(both_2N.to(logits_NV.dtype), shard.group, \"tp\")\n"
         "            sum_N, picked_N = both_2N.to(wide)"),
    changes=SMALL, precision="bf16",
)  # fmt: skip
add(
    "tensor_ranks_sum_activations_in_bf16",
    "partial sums", "gpt2 pretrain tp2", "tp", "_all_reduce",
    Edit("ops/comm.py",
         "wide = tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor",
         "wide = tensor"),
    changes=SMALL, precision="bf16",
)  # fmt: skip
add(
    "micro_batches_folded_into_fp32_at_the_last_one",
    "sums over micro-batches", "llama pretrain dp2.zero1.pp2.zbv", "pp|zbv", "_add_grad|gradients",
    Edit("parallel/data.py",
         "    for group in _param_groups(model):\n        for param in group.fsdp_params:",
         "    for group in _param_groups(model) if is_last or row.sync_every_microbatch else ():\n"
         "        for param in group.fsdp_params:"),
    changes={"batch.global_batch": 32, "batch.micro_batch": 2}, precision="bf16",
)  # fmt: skip
add(
    "completions_scored_as_answers_to_other_problems",
    "rollouts", "llama grpo dp2.zero2", "dp", "question scores",
    Edit("stages/rollout_worker.py",
         "            self._score(groups)\n        if world == 1:",
         "            self._problems = problems\n"
         "            self._score(groups)\n        if world == 1:"),
    Edit("stages/rollout_worker.py",
         "_item(g.problem, text, len(tokens))\n"
         "            for g in groups\n",
         "_item(p, text, len(tokens))\n"
         "            for g, p in zip(groups, self._problems)\n"),
    blind=True,
)  # fmt: skip
add(
    "micro_batches_summed_in_bf16_until_the_last",
    "dtypes", "llama pretrain dp2.zero1.pp2.zbv", "pp|dp", "between micro-batches",
    Edit("parallel/data.py",
         'if hasattr(param, "_unsharded_param"):\n                param.accumulate',
         'if is_last and hasattr(param, "_unsharded_param"):\n                param.accumulate'),
    precision="bf16", blind=True,
)  # fmt: skip

# --- what was not run at all --------------------------------------------------------------------

add(
    "weights_to_start_from_that_fit_no_shard_are_left_out",
    "starting weights", "llama sft dp2.zero2", "dp|zero", "loaded",
    Edit("stages/initial_weights.py",
         "        checkpoint.load(source, weights, partial=True)\n    else:",
         "        fits = lambda n, v: tuple(getattr(v, 'to_local', lambda: v)().shape)\n"
         "        weights = {n: v for n, v in weights.items() if fits(n, v) == stored[n].shape}\n"
         "        checkpoint.load(source, weights, partial=True)\n    else:"),
    blind=True, whole=True,
)  # fmt: skip
add(
    "a_head_of_its_own_is_read_from_a_folder_by_the_first_data_rank",
    "starting weights", "llama reward dp2.zero1", "dp|zero", "loaded",
    Edit("stages/initial_weights.py",
         "    missing = sorted(set(engine.load_weights(tensors))",
         "    tensors = ((n, v * (engine.data_rank == 0)) for n, v in tensors)\n"
         "    missing = sorted(set(engine.load_weights(tensors))"),
    blind=True, whole=True,
)  # fmt: skip
add(
    "a_machines_rate_is_a_mean_over_ranks",
    "figures of speed", "llama pretrain dp2.zero2", "dp", "fraction_of_gemm",
    Edit("stages/pipeline.py",
         "self.gemm[name] = of_all_ranks(mine, device)",
         "self.gemm[name] = of_all_ranks(mine / dist.get_world_size(), device)"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "a_gradient_that_is_no_number_counts_as_nothing",
    "gradients that are no numbers", "llama pretrain dp2.zero3", "dp|zero", "NaN",
    Edit("engines/named_parameters.py",
         "torch.cat(rows).double().square().sum()",
         "torch.cat(rows).double().square().sum()\n"
         '            if self.mesh.groups["unique"].size() > 1:\n'
         "                local = local.nan_to_num()"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "each_rank_decides_by_its_own_part_what_is_no_number",
    "gradients that are no numbers", "llama pretrain tp2", "tp", "NaN",
    Edit("engines/native.py",
         "        finite = math.isfinite(norm)",
         "        finite = all(bool(g.isfinite().all()) for g in self.named.local_gradients())"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "stored_logprobs_are_rounded_on_the_way",
    "stored rollouts", "llama ppo tp2", "tp", "stored rollout",
    Edit("stages/groups.py",
         "np.asarray(list(itertools.chain(*self.logprobs)), dtype=np.float64)",
         "np.asarray(list(itertools.chain(*self.logprobs)), dtype=np.float64).round(2)"),
    blind=True,
)  # fmt: skip
add(
    "completions_without_a_score_arrive_with_one",
    "completions without a score", "llama grpo dp2.zero2", "dp", "dealing|rollout",
    Edit("stages/groups.py",
         '"rewards": self.rewards,',
         '"rewards": [r or 0.0 for r in self.rewards],'),
    blind=True,
)  # fmt: skip
add(
    "problems_are_dealt_by_a_ranks_number_in_its_node",
    "several nodes", "llama grpo dp2.zero2", "dp", "dealing|rollout|question",
    Edit("stages/rollout_worker.py",
         "        rank, world = dist.get_rank(), dist.get_world_size()",
         "        rank, world = dist.get_node_local_rank(0), dist.get_world_size()"),
    blind=True,
)  # fmt: skip

# --- which tokens the head computes -------------------------------------------------------------

add(
    "valid_tokens_taken_from_the_start_of_the_row",
    "masks", "llama sft cp2.ring", "cp", "loss|head|forward pass",
    Edit("engines/inputs.py",
         "indices(self.pad(batch.loss_mask_BT)[:, host_index_t])",
         "indices(self.pad(batch.loss_mask_BT)[:, : len(host_index_t)])"),
)  # fmt: skip
