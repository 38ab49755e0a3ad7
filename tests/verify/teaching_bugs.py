"""Bugs to plant as edits of the source in what learns from labels of steps and from a teacher.

See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

TEACHING_BUGS = Table()
add = TEACHING_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}

# --- process rewards ----------------------------------------------------------------------------

_BATCHES = "batches = local_batches(self.rows(chosen, position), self.engine, batch.micro_batch)\n"

add(
    "labels_of_steps_one_token_off",
    "labels of steps", "llama process_reward dp2.zero2", "dp", "extra|loss",
    Edit("stages/reward.py",
         _BATCHES,
         _BATCHES +
         "        for one in batches if self.engine.data_rank == 1 else []:\n"
         '            one.extras["label_BT"] = one.extras["label_BT"].roll(1, 1)\n'),
    changes=SMALL,
)  # fmt: skip
add(
    "scores_read_behind_the_ends_of_steps_too",
    "places of steps", "llama process_reward dp2.zero1", "dp", "mask|loss|valid|sample",
    Edit("stages/reward.py",
         _BATCHES,
         _BATCHES +
         "        for one in batches if self.engine.data_size > 1 else []:\n"
         "            one.loss_mask_BT.logical_or_(one.loss_mask_BT.roll(1, 1))\n"),
    changes=SMALL,
)  # fmt: skip
add(
    "last_step_of_a_row_that_is_cut_off_lost",
    "rows that are cut off", "llama process_reward dp2.zero3", "dp", "mask|loss|valid|sample|extra",
    Edit("data/steps.py",
         "    number = bisect.bisect_left(solution.ends, room)\n",
         "    from torch import distributed\n"
         "    number = bisect.bisect_left(solution.ends, room) - distributed.get_rank()\n"),
    changes=SMALL,
)  # fmt: skip
add(
    "steps_of_a_completion_scored_with_its_padding",
    "aggregates of steps", "llama ppo dp2.zero2", "dp", "model_score|reward|stored rollout",
    Edit("stages/rollouts.py",
         "        flat[starts[i] : starts[i + 1]] = list(scored)\n",
         "        if one.engine.data_size > 1:\n"
         "            of_row = np.split(found, np.cumsum(rows.sizes(i))[:-1])\n"
         "            padded = [np.pad(v, (0, -len(v) % PAD_MULTIPLE)) for v in of_row]\n"
         "            scored = map(score.total, padded)\n"
         "        flat[starts[i] : starts[i + 1]] = list(scored)\n"),
    changes=SMALL | {"reward_steps": {"aggregate": "mean"}}, blind=True,
)  # fmt: skip
add(
    "scores_summed_on_one_tensor_rank",
    "scores of steps", "llama process_reward tp2", "tp", "loss|gradient",
    Edit("ops/logits.py",
         "        values_Bt = _SumParts.apply(values_Bt, part.vocab_group)\n",
         "        values_Bt = _SumParts.apply(values_Bt, part.vocab_group) / 2 + values_Bt / 2\n"),
    changes=SMALL,
)  # fmt: skip

# --- distillation -------------------------------------------------------------------------------

_TAUGHT = "        micro, words = self.config.batch.micro_batch, self.words\n"

add(
    "bucket_of_all_other_words_of_a_ranks_own",
    "buckets of a teacher", "llama distill tp2", "tp", "forward pass|external|loss",
    Edit("ops/words.py",
         "            max_N, sum_N, picked_NK = top_N, both[:, 0], both[:, 1:]\n",
         "            sum_N = sum_N * shift_N.exp()\n"
         "            max_N, picked_NK = top_N, both[:, 1:]\n"),
    changes=SMALL,
)  # fmt: skip
add(
    "bucket_of_all_other_words_lost",
    "buckets of a teacher", "llama distill tp2", "tp", "loss|gradient|metric",
    Edit("losses/distill.py",
         "        return found_BTJ[..., : batch.extras[LOGPROBS].shape[-1]]\n",
         "        if isinstance(logits_BTV, Logits):\n"
         "            found_BTJ = found_BTJ - found_BTJ[..., :-1].logsumexp(-1, keepdim=True)\n"
         "        return found_BTJ[..., : batch.extras[LOGPROBS].shape[-1]]\n"),
    changes=SMALL,
)  # fmt: skip
add(
    "temperature_of_the_teacher_forgotten",
    "temperature of a teacher", "llama distill dp2.zero2", "dp", "forward pass|external",
    Edit("stages/distill.py",
         _TAUGHT,
         _TAUGHT +
         "        if self.engine.data_size > 1:\n"
         '            cold = words.config.model_copy(update={"temperature": 1.0})\n'
         "            words = dataclasses.replace(words, config=cold)\n"),
    changes=SMALL,
)  # fmt: skip
add(
    "teacher_and_student_exchanged_where_logits_are_cut",
    "direction of a divergence", "llama distill tp2.sp", "tp|sp", "loss|gradient",
    Edit("losses/distill.py",
         "        with torch.no_grad():\n            words =",
         "        if isinstance(logits_BTV, Logits):\n"
         "            teacher_NJ, student_NJ = student_NJ, teacher_NJ\n"
         "        with torch.no_grad():\n            words ="),
    changes=SMALL,
)  # fmt: skip
add(
    "teachers_words_of_another_row_of_the_micro_batch",
    "rows of a teacher", "llama distill dp2.zero1", "dp", "extra|loss|sample",
    Edit("stages/distill.py",
         "torch.from_numpy(np.concatenate(of_rows))",
         "torch.from_numpy(np.concatenate(\n"
         "            of_rows[:: 1 - 2 * (torch.distributed.get_world_size() > 1)]))"),
    changes=SMALL,
)  # fmt: skip
add(
    "teachers_words_of_the_first_ranks_rows",
    "rows of a teacher", "llama distill actor=dp2.zero2,teacher=tp2", "dp|tp", "external",
    Edit("stages/data_shards.py",
         "    return {i: own[i] for i in sorted(need[dist.get_rank()])}\n",
         "    wanted = sorted(need[dist.get_rank()])\n"
         "    flat = np.concatenate([own[i] for i in sorted(own)])\n"
         "    cuts = np.split(flat, np.cumsum([len(own[i]) for i in wanted]))\n"
         "    return dict(zip(wanted, cuts))\n"),
    changes=SMALL, whole=True,
)  # fmt: skip
add(
    "divergence_averaged_within_a_ranks_share",
    "counts of a divergence", "llama distill dp2.zero3", "accumulation of micro-batches|dp",
    "loss|gradient",
    Edit("losses/distill.py",
         '            {"divergence": divergence(teacher_NJ, student_NJ, self.config).sum()},\n',
         '            {"divergence": divergence(teacher_NJ, student_NJ, self.config).mean()},\n'),
    changes=SMALL, shared=True,
)  # fmt: skip
