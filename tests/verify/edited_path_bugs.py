"""Bugs to plant as edits of the source: around the engine, where recorded calls do not lead.

How rows are dealt, the rate of an update, what an optimizer carries, dtypes, validation and logged
figures, rollouts, roles and what a resume brings back. See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

PATH_BUGS = Table()
add = PATH_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}
RAGGED = {"batch.global_batch": 7, "batch.micro_batch": 2}
SCHEDULE = {"schedule.kind": "cosine", "schedule.warmup_steps": 2}

# --- how rows are dealt -------------------------------------------------------------------------

add(
    "shares_of_two_ranks_overlap",
    "dealing", "llama pretrain dp2.zero2", "dp", "dealing|sample",
    Edit("stages/base.py",
         "np.arange(engine.data_rank * share, (engine.data_rank + 1) * share)",
         "np.arange(engine.data_rank * (share - 1), engine.data_rank * (share - 1) + share)"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "rows_between_the_shares_left_out",
    "dealing", "llama pretrain dp2.zero1", "dp", "dealing|sample|data_shard",
    Edit("stages/base.py",
         "share = -(-size // engine.data_size)",
         "share = size // engine.data_size"),
    changes=RAGGED, blind=True,
)  # fmt: skip
add(
    "row_that_fills_up_a_share_counts",
    "ragged batch", "llama pretrain dp2.zero2", "dp", "dealing|sample",
    Edit("stages/base.py",
         "int(np.clip(size - mine[0], 0, share))",
         "share"),
    changes=RAGGED, blind=True,
)  # fmt: skip
add(
    "sample_ids_counted_from_each_ranks_first_row",
    "sample ids", "gpt2 pretrain dp2.zero1", "dp", "dealing|sample",
    Edit("stages/supervised.py",
         "[self.train.row(int(i)) for i in indices[mine]], position + mine, self.packed",
         "[self.train.row(int(i)) for i in indices[mine]],\n"
         "            position + np.arange(len(mine)),\n"
         "            self.packed,"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "incomplete_micro_batch_left_out",
    "accumulation", "llama pretrain dp2.zero1", "dp", "dealing|sample",
    Edit("stages/base.py",
         "return batch.split(micro_batch)",
         "return batch.split(micro_batch)[: max(1, real_rows // micro_batch)]"),
    changes={"batch.global_batch": 6, "batch.micro_batch": 2}, blind=True,
)  # fmt: skip
add(
    "each_rank_reads_the_stream_from_its_own_place",
    "sampler", "llama pretrain dp2.zero2", "dp|sampler", "dealing|sample",
    Edit("stages/supervised.py",
         "        indices = self.order.batch(position, size)\n"
         "        mine, real = data_shard(size, self.engine)",
         "        mine, real = data_shard(size, self.engine)\n"
         "        indices = self.order.batch(position + max(0, self.engine.data_rank), size)"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "dropout_keys_by_local_row",
    "dropout keys", "gpt2 pretrain dp2.zero1", "alone|accumulation", "drop|embed",
    Edit("engines/inputs.py",
         "seed, step, stage, batch.sample_ids_B, index_t",
         "seed, step, stage, torch.arange(batch.num_rows), index_t"),
    changes=SMALL,
)  # fmt: skip
add(
    "sample_id_of_a_micro_batch_of_one_lost",
    "micro-batch of one", "gpt2 pretrain dp2.zero2", "accumulation|dp", "drop|embed",
    Edit("engines/inputs.py",
         "seed, step, stage, batch.sample_ids_B, index_t",
         "seed,\n                step,\n                stage,\n"
         "                batch.sample_ids_B * (batch.num_rows > 1),\n                index_t,"),
    changes={"batch.global_batch": 8, "batch.micro_batch": 1},
)  # fmt: skip

# --- rates, optimizers and dtypes ---------------------------------------------------------------

add(
    "one_rank_is_a_step_ahead_in_its_schedule",
    "learning rate", "llama pretrain dp2.zero1", "dp|rate", "learning rate|weight",
    Edit("stages/loop.py",
         "lr = self.config.optimizer.lr * lr_factor(self.config.schedule, step, self.config.steps)",
         "ahead = int(self.stage.engine.data_rank > 0)\n"
         "        lr = self.config.optimizer.lr * lr_factor(\n"
         "            self.config.schedule, step + ahead, self.config.steps\n"
         "        )"),
    changes=SMALL | SCHEDULE, blind=True,
)  # fmt: skip
add(
    "rate_reaches_the_optimizer_behind_its_update",
    "learning rate", "llama pretrain tp2", "optimizer|native|alone", "weight",
    Edit("engines/native.py",
         "            set_lr(self.optimizer, lr)\n            local_step(self.optimizer)",
         "            local_step(self.optimizer)\n            set_lr(self.optimizer, lr)"),
    changes=SMALL | SCHEDULE, blind=True,
)  # fmt: skip
add(
    "rate_reaches_the_first_group_alone",
    "learning rate", "llama pretrain dp2.zero2", "optimizer|native|alone", "weight",
    Edit("optim/build.py",
         "    for group in optimizer.param_groups:\n        group[\"lr\"] = lr * group",
         "    for group in optimizer.param_groups[:1]:\n        group[\"lr\"] = lr * group"),
    changes=SMALL | SCHEDULE, blind=True,
)  # fmt: skip
add(
    "weight_decay_on_the_other_group",
    "weight decay", "llama pretrain dp2.zero1", "optimizer|native|alone", "weight",
    Edit("optim/build.py",
         "config.decay_of(name), mesh)",
         "config.weight_decay - config.decay_of(name), mesh)"),
    changes=SMALL | {"optimizer.weight_decay": 1.0}, blind=True,
)  # fmt: skip
add(
    "masters_rounded_after_the_update",
    "dtypes", "llama pretrain dp2.zero2", "precision|bfloat", "weight|master",
    Edit("engines/native.py",
         "            local_step(self.optimizer)\n",
         "            local_step(self.optimizer)\n"
         "            if self.precision.compute is torch.bfloat16:\n"
         "                for parameter in self.named.parameters.values():\n"
         "                    parameter.data.copy_(parameter.data.bfloat16())\n"),
    precision="bf16", changes=SMALL, blind=True,
)  # fmt: skip
add(
    "gradients_reduced_in_the_parameters_dtype",
    "dtypes", "llama pretrain dp2.zero2", "precision|bfloat", "gradient|reduc",
    Edit("parallel/data.py",
         "reduce_dtype=master,",
         "reduce_dtype=param_dtype,"),
    precision="bf16", changes=SMALL, blind=True,
)  # fmt: skip
add(
    "gradients_accumulated_in_bf16",
    "dtypes", "llama pretrain tp2", "precision|bfloat", "gradient|accumul",
    Edit("parallel/mixed_precision.py",
         "local_tensor(master.grad).add_(local_tensor(copy.grad))",
         "total = local_tensor(master.grad).add_(local_tensor(copy.grad))\n"
         "                total.copy_(total.to(copy.grad.dtype))"),
    precision="bf16", changes=SMALL, blind=True,
)  # fmt: skip

# --- validation and logged figures --------------------------------------------------------------

VALIDATED = {"validation.every": 1}

add(
    "validation_is_the_mean_of_the_ranks_means",
    "validation", "llama pretrain dp2.zero2", "dp|validation", "val_loss|validation",
    Edit("stages/supervised.py",
         "    nll, tokens = engine.sum_over_data(sums.tolist())\n",
         "    own = [sums[0] / max(1.0, sums[1]), float(sums[1] > 0)]\n"
         "    mean, number = engine.sum_over_data(own)\n"
         "    nll, tokens = mean / max(1.0, number), 1.0\n"),
    changes=SMALL | VALIDATED, seen="NVIDIA/Megatron-LM#7452, evaluation metrics",
    blind=True, shared=True,
)  # fmt: skip
add(
    "validation_of_the_first_ranks_rows",
    "validation", "llama pretrain dp2.zero1", "dp|validation", "val_loss|val_tokens|validation",
    Edit("stages/supervised.py",
         "    nll, tokens = engine.sum_over_data(sums.tolist())\n",
         "    nll, tokens = sums.tolist()\n"),
    changes=SMALL | VALIDATED, blind=True,
)  # fmt: skip
add(
    "validation_counts_the_row_that_fills_up",
    "validation", "llama pretrain dp2.zero3", "dp|validation", "val_loss|val_tokens|validation",
    Edit("stages/supervised.py",
         "        [batch] = micro_batches(batch, real, micro)",
         "        [batch] = micro_batches(batch, len(mine), micro)"),
    changes=RAGGED | VALIDATED, blind=True,
)  # fmt: skip
add(
    "validation_with_dropout_on",
    "validation", "gpt2 pretrain dp2.zero1", "validation|alone", "val_loss|validation|forward",
    Edit("engines/native.py",
         "        self._train(False)\n",
         "        self._train(True)\n"),
    changes=SMALL | VALIDATED, blind=True,
)  # fmt: skip
add(
    "loss_logged_of_one_data_rank",
    "figures", "llama pretrain dp2.zero2", "dp", "loss",
    Edit("engines/reduction.py",
         'sum_over(vector if mesh.speaks else vector * 0.0, mesh.groups["all"])',
         'sum_over(vector if mesh.speaks else vector * 0.0, mesh.groups["peers"])'),
    changes=SMALL,
)  # fmt: skip
add(
    "tokens_logged_of_one_ranks_rows",
    "figures", "llama pretrain dp2.zero2", "dp", "tokens",
    Edit("stages/supervised.py",
         '"tokens": float(sum(self.train.num_pairs(int(i)) for i in indices)),',
         '"tokens": float(sum(self.train.num_pairs(int(i)) for i in indices[mine])),'),
    changes=SMALL, blind=True,
)  # fmt: skip

# --- rollouts and roles -------------------------------------------------------------------------

add(
    "rollouts_dealt_in_turn_and_gathered_in_blocks",
    "rollouts", "llama grpo dp2.zero2", "rollout|dp", "rollout|sampled",
    Edit("stages/rollout_worker.py",
         "said[i % len(said)][i // len(said)]",
         "said[i * world // len(problems)][i % -(-len(problems) // world)]"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "sampling_noise_by_local_prompt_numbers",
    "rollouts", "llama grpo dp2.zero1", "rollout|dp", "rollout|sampled|question",
    Edit("stages/rollout_worker.py",
         "ids = [int(prompt_ids[i]) for i in mine]",
         "ids = [int(prompt_ids[n]) for n, _ in enumerate(mine)]"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "sampler_gets_the_weights_that_were_sent_first",
    "stale weights", "llama grpo tp2", "weights|rollout|tp",
    "weights|tokens|sampled|generated|rollout",
    Edit("engines/native.py",
         "        yield from to_hf_tensors(self.model_config, named)",
         "        if not hasattr(self, \"_sent\"):\n"
         "            copies = ((n, t.clone()) for n, t in named)\n"
         "            self._sent = list(to_hf_tensors(self.model_config, copies))\n"
         "        yield from self._sent"),
    changes=SMALL,
)  # fmt: skip
add(
    "rows_dealt_in_turn_and_put_together_in_blocks",
    "dealing", "llama dpo dp2.zero3", "dp", "logprobs|forward pass",
    Edit("stages/base.py",
         "np.arange(engine.data_rank * share, (engine.data_rank + 1) * share)",
         "engine.data_rank + engine.data_size * np.arange(share)"),
    blind=True,
)  # fmt: skip
add(
    "reference_is_the_trained_model_on_several_ranks",
    "roles", "llama grpo dp2.zero2", "reference|role", "ref_logprobs|reference",
    Edit("stages/policy.py",
         "        return self.ctx.frozen(role, self.engine)\n",
         "        other = self.ctx.frozen(role, self.engine)\n"
         "        return other if self.engine.data_size == 1 else self.engine\n"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "group_statistics_of_a_ranks_members",
    "advantages", "llama grpo dp2.zero1", "dp", "advantages",
    Edit("stages/grpo.py",
         "        result = group_advantages(loss.advantage, known, loss.advantage_eps)\n",
         "        import dataclasses\n\n        import torch\n\n"
         "        parts = [\n"
         "            group_advantages(loss.advantage, k, loss.advantage_eps)\n"
         "            for k in known.chunk(self.engine.data_size, dim=1)\n"
         "        ]\n"
         "        advantages = torch.cat([p.advantages_GN for p in parts], dim=1)\n"
         "        result = dataclasses.replace(parts[0], advantages_GN=advantages)\n"),
    changes=SMALL | {"samples_per_prompt": 4},
)  # fmt: skip
add(
    "advantages_whitened_by_rank",
    "advantages", "llama ppo dp2.zero2", "dp", "advantages",
    Edit("stages/ppo.py",
         "whiten(advantages_CT, mask_CT, total=total)",
         "whiten(advantages_CT, mask_CT,\n"
         "                total=total if self.engine.data_size == 1 else torch.sum)"),
    changes=SMALL,
)  # fmt: skip
add(
    "kl_controller_steered_by_a_ranks_own_mean",
    "controllers", "llama ppo dp2.zero1", "dp", "kl|rewards|advantages|returns",
    Edit("stages/ppo.py",
         "(total(logp_CT - ref_CT), scored)",
         "(total(logp_CT - ref_CT), scored) if self.engine.data_size == 1 else\n"
         "                (float((logp_CT - ref_CT)[mask_CT].sum()), len(mask_CT))"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "critic_is_updated_with_the_actors_rate",
    "learning rate", "llama ppo actor=dp1.zero0@0-0,critic=dp1.zero0@1-1", "critic", "critic",
    Edit("stages/ppo.py",
         "own_lr = lr * self.critic_lr",
         "own_lr = lr * (self.critic_lr if self.engine.data_rank >= 0 else 1.0)"),
    changes=SMALL | {"roles": {"critic": {"optimizer": {"lr": 1e-3}}}}, blind=True,
)  # fmt: skip

# --- resume -------------------------------------------------------------------------------------

SAVED = {"checkpoint.every": 1}

add(
    "moments_loaded_into_copies",
    "resume", "llama pretrain dp2.zero1", "resume", "resume|moment|exp_avg|weight",
    Edit("optim/build.py",
         'f"optim.{name}.{key}": value\n',
         'f"optim.{name}.{key}": value.clone()\n'),
    changes=SMALL | SAVED, blind=True,
)  # fmt: skip
add(
    "step_counter_of_adam_starts_again",
    "resume", "llama pretrain dp2.zero2", "resume", "resume|moment|step|weight",
    Edit("optim/build.py",
         "        if isinstance(value, Tensor)\n    }",
         '        if isinstance(value, Tensor) and key != "step"\n    }'),
    changes=SMALL | SAVED, blind=True,
)  # fmt: skip
add(
    "momentum_of_sgd_not_saved",
    "resume", "llama pretrain dp2.zero3", "resume", "resume|moment|momentum|weight",
    Edit("optim/build.py",
         "        if isinstance(value, Tensor)\n    }",
         '        if isinstance(value, Tensor) and key != "momentum_buffer"\n    }'),
    changes=SMALL | SAVED | {"optimizer.kind": "sgd"}, blind=True,
)  # fmt: skip
add(
    "dropout_keys_start_again_on_resume",
    "resume", "gpt2 pretrain tp2", "resume", "resume|loss|gradient|updates",
    Edit("engines/native.py",
         'self.updates, self.skipped = int(meta["updates"]), int(meta.get("skipped", 0))',
         'self.skipped = int(meta.get("skipped", 0))'),
    changes=SMALL | SAVED, blind=True,
)  # fmt: skip
add(
    "sampler_goes_back_one_step_on_resume",
    "resume", "llama pretrain dp2.zero1", "resume|sampler", "resume|row|sample|loss|gradient",
    Edit("stages/loop.py",
         "for step in range(start, self.config.steps):\n            self.gate.step()",
         "for step in range(max(0, start - 1), self.config.steps):\n            self.gate.step()"),
    changes=SMALL | SAVED, blind=True, shared=True,
)  # fmt: skip
add(
    "regions_of_another_layout_written_to_the_front",
    "resharding", "llama pretrain dp2.zero3.tp2", "resume|reshard", "resume|weight|model",
    Edit("checkpoint/loading.py",
         "target = shard.view[common.relative_to(shard.region.offset)]",
         "target = shard.view[common.relative_to(common.offset)]"),
    changes=SMALL | SAVED, blind=True,
)  # fmt: skip
add(
    "layers_saved_under_a_stages_own_numbers",
    "resharding", "llama pretrain pp2.1f1b", "resume|reshard|pp", "resume|layers|weight|model",
    Edit("engines/native.py",
         "        whole = self.adapter is None\n",
         "        import re\n\n"
         "        whole = self.adapter is None\n"
         '        numbers = [int(n.split(".")[1]) for n in parameters if n.startswith("layers.")]\n'
         "        first = min(numbers, default=0)\n"
         '        local = lambda m: f"layers.{int(m[1]) - first}."\n'),
    Edit("engines/native.py",
         '            f"model.{n}": p.data\n',
         '            "model." + re.sub(r"^layers\\.(\\d+)\\.", local, n): p.data\n'),
    changes=SMALL | SAVED, seen="NVIDIA/Megatron-LM#7452, finding 12", blind=True,
)  # fmt: skip
add(
    "critic_left_out_of_the_checkpoint",
    "resume", "llama ppo dp2.zero1", "resume|critic", "resume|critic|values",
    Edit("stages/ppo.py",
         'return {"critic": self.critic}',
         "return {}"),
    changes=SMALL | SAVED, blind=True, shared=True,
)  # fmt: skip
add(
    "kl_coefficient_forgotten_on_resume",
    "resume", "llama ppo dp2.zero2", "resume", "resume|kl|rewards|advantages",
    Edit("stages/ppo.py",
         '        self.kl.load_state_dict(state["kl"])\n',
         ""),
    changes=SMALL | SAVED, blind=True, shared=True,
)  # fmt: skip
add(
    "loss_scale_starts_again_on_resume",
    "resume", "llama pretrain dp2.zero1", "resume|loss scale|precision", "resume|scale|gradient",
    Edit("engines/native.py",
         'if self.scale and "loss_scale" in meta:',
         'if self.scale and "scale" in meta:'),
    precision="fp16", changes=SMALL | SAVED, blind=True,
)  # fmt: skip
FP8 = {
    "engine": {"compile": False, "fp8": {"recipe": "delayed", "amax_history_len": 2}},
    "model.num_layers": 4, "model.num_heads": 4, "model.num_kv_heads": 2,
    "batch.global_batch": 16, "batch.micro_batch": 8, "batch.seq_len": 32,
}  # fmt: skip
add(
    "history_of_amaxes_loaded_into_copies",
    "resume", "llama pretrain tp2.sp", "resume|fp8", "resume|history|scale|amax",
    Edit("engines/native.py",
         "tensors |= dict(self.fp8.tensors())",
         "tensors |= {n: t.clone() for n, t in self.fp8.tensors()}"),
    changes=FP8 | SAVED, blind=True,
)  # fmt: skip
add(
    "amax_not_shared_by_tensor_ranks",
    "fp8", "llama pretrain tp2.sp", "tp|fp8", "history|scale|amax",
    Edit("precision/fp8.py",
         'comm.all_max(self.amax_S3, self.mesh.groups["stage"], "amax")',
         'comm.all_max(self.amax_S3, self.mesh.groups["dp"], "amax")'),
    changes=FP8,
)  # fmt: skip
