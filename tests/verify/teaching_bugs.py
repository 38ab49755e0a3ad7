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
    "places of steps", "llama process_reward dp2.zero1", "dp", "mask|loss|valid",
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
         "            scored = found if one.score is None else map(one.score.total, found)\n",
         "            if one.score is not None and one.engine.data_size > 1:\n"
         "                found = [np.pad(v, (0, -len(v) % PAD_MULTIPLE)) for v in found]\n"
         "            scored = found if one.score is None else map(one.score.total, found)\n"),
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
