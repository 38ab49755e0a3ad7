"""Bugs to plant as edits of the source in what learns from preferences.

`PREFERENCE_BUGS` are of layouts, for verify; see `edited_bugs` for the fields. `FORMULA_BUGS` are
in lines that one process runs, too: a comparison of layouts cannot see them, the plain formulas of
`tests.losses.test_preference` do.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

PREFERENCE_BUGS = Table()
add = PREFERENCE_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2, "num_held_out": 0}
RAGGED = {**SMALL, "batch.global_batch": 7}

# --- KTO's baseline -----------------------------------------------------------------------------

add(
    "ktos_baseline_of_each_ranks_own_answers",
    "preference baseline", "llama kto dp2.zero2", "dp", "divergence|extra",
    Edit("stages/dpo.py",
         "        return sum(ratios) / len(ratios)",
         "        ratios = ratios[max(0, self.engine.data_rank) :: self.engine.data_size]\n"
         "        return sum(ratios) / len(ratios)"),
    changes=SMALL, blind=True,
)  # fmt: skip
add(
    "answers_mismatched_within_a_ranks_share",
    "preference baseline", "llama kto dp2.zero3", "dp", "forward pass|divergence",
    Edit("stages/dpo.py",
         "        rows = self._rows(mismatched(rankings, self.config.batch.seq_len), ids)",
         "        n = len(rankings) // self.engine.data_size\n"
         "        shares = [rankings[i : i + n] for i in range(0, len(rankings), n)]\n"
         "        other = [r for s in shares for r in mismatched(s, self.config.batch.seq_len)]\n"
         "        rows = self._rows(other, ids)"),
    changes=SMALL, blind=True,
)  # fmt: skip

# --- the reference ------------------------------------------------------------------------------

add(
    "reference_follows_the_policy_on_several_ranks",
    "preference reference", "llama dpo dp2.zero2", "dp", "forward pass|extra",
    Edit("stages/dpo.py",
         "            self.reference = ctx.frozen(REFERENCE, self.engine)",
         "            self.reference = ctx.frozen(REFERENCE, self.engine)\n"
         "            if self.engine.data_size > 1:\n"
         "                self.reference = self.engine"),
    changes=SMALL,
)  # fmt: skip
add(
    "stored_log_probabilities_of_another_ranking",
    "preference reference", "llama dpo dp2.zero1", "dp", "extra|forward pass",
    Edit("stages/dpo.py",
         "            return [self.stored[part][i] for i in indices]",
         "            shift = max(0, self.engine.data_rank)\n"
         "            return [\n"
         "                [a + shift for a in self.stored[part][i]] for i in indices\n"
         "            ]"),
    changes={**SMALL, "reference": "precomputed"},
)  # fmt: skip

# --- pairs --------------------------------------------------------------------------------------

add(
    "chosen_and_rejected_swapped_on_one_rank",
    "preference pairs", "llama dpo dp2.zero2", "dp", "extra|loss",
    Edit("stages/dpo.py",
         "        batches = local_batches(rows, self.engine, batch.micro_batch)",
         "        batches = local_batches(rows, self.engine, batch.micro_batch)\n"
         "        if self.engine.data_rank == 1:\n"
         "            for one in batches:\n"
         '                one.extras["rating_BT"].neg_()'),
    changes=SMALL,
)  # fmt: skip
add(
    "pair_that_fills_up_a_share_counts",
    "preference pairs", "llama dpo dp2.zero1", "dp", "sample|loss|dealing|data_shard",
    Edit("stages/data_shards.py",
         "max(0, real - i))",
         "micro_batch)"),
    changes=RAGGED,
)  # fmt: skip
# --- formulas -----------------------------------------------------------------------------------

_LOSS = "losses/preference.py"
FORMULA_BUGS: dict[str, Edit] = {
    "averaged_instead_of_summed": Edit(
        _LOSS, "ratios = both(answers.sum(answers.ratios))",
        "ratios = both(answers.sum(answers.ratios) / length_N)",
    ),
    "ipo_not_averaged": Edit(
        _LOSS, 'if config.kind == "ipo" or getattr', "if getattr",
    ),
    "beta_forgotten": Edit(
        _LOSS, '"hinge": lambda c, pair: hinge(c.beta * _delta(c, pair))',
        '"hinge": lambda c, pair: hinge(_delta(c, pair))',
    ),
    "reference_forgotten": Edit(
        _LOSS, "return self.logp_M if self.ref_M is None else self.logp_M - self.ref_M",
        "return self.logp_M",
    ),
    "smoothing_on_one_term": Edit(
        "losses/ranking.py", "-(1.0 - smoothing) * F.logsigmoid(d_P) - smoothing",
        "-F.logsigmoid(d_P) - smoothing",
    ),
    "robust_with_a_plus": Edit(
        _LOSS, "* clean - flipped * other", "* clean + flipped * other",
    ),
    "margin_of_simpo_times_beta": Edit(
        _LOSS, "rejected - config.margin", "rejected - config.beta * config.margin",
    ),
    "tail_weighed_in_the_shorter_answer": Edit(
        _LOSS, "prefix_NT[side_P, shared_P - 1] for", "prefix_NT[side_P, shared_P - 2] for",
    ),
    "odds_without_their_complement": Edit(
        _LOSS, "return logp - torch.log(-torch.expm1(logp))", "return logp",
    ),
    "baseline_with_the_wrong_sign": Edit(
        _LOSS, "config.beta * (ratio - baseline.detach())",
        "config.beta * (ratio + baseline.detach())",
    ),
    "weights_of_kto_exchanged": Edit(
        _LOSS, "good, bad = config.desirable_weight, config.undesirable_weight",
        "bad, good = config.desirable_weight, config.undesirable_weight",
    ),
    "sft_of_both_answers": Edit(
        _LOSS, "loss_N = torch.where(best_N, -answers.sum(logp_M), 0.0)",
        "loss_N = -answers.sum(logp_M)",
    ),
    "apo_down_without_its_anchor": Edit(
        _LOSS, "torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)",
        "torch.sigmoid(rejected - chosen)",
    ),
    "exo_with_exchanged_targets": Edit(
        _LOSS, "(better - math.log1p(-flipped))", "(better - math.log(flipped))",
    ),
}  # fmt: skip
