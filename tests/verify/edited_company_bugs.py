"""Bugs to plant as edits of the source: what only company shows.

Of other rows in a micro-batch or an evaluation, of other completions in flight, of another role.
See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

COMPANY_BUGS = Table()
add = COMPANY_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}

add(
    "keys_skipped_if_one_row_of_a_micro_batch_sees_none",
    "rows of a micro-batch", "llama pretrain cp2.ring", "cp", "extreme output|attn",
    Edit("parallel/context.py",
         "if allowed.is_cpu and not bool(allowed.any()):",
         "if allowed.is_cpu and not bool(allowed.flatten(1).any(dim=1).all()):"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "a_rank_without_rows_counts_the_last_one_again",
    "rows of an evaluation", "llama pretrain dp2.zero2", "dp", "val_",
    Edit("stages/base.py",
         "int(np.clip(size - mine[0], 0, share))",
         "int(np.clip(size - mine[0], 1, share))"),
    changes=SMALL | {"evaluations": [{"kind": "bits_per_byte", "seq_len": 64}]},
    blind=True, whole=True,
)  # fmt: skip
add(
    "completions_of_a_prompt_write_the_page_that_they_share",
    "completions in flight", "llama pretrain dp2.zero2", "engine", "generated",
    Edit("rollout/pages.py",
         "return item.length % self.page_size != 0 and self.holders[item.table[-1]] > 1",
         "return False"),
    changes=SMALL, blind=True, shared=True, whole=True,
)  # fmt: skip
add(
    "behind_a_references_pass_its_adapter_stays_gathered",
    "passes of another role", "llama grpo dp2.zero1", "dp|zero", "actor update 3|actor update 2",
    Edit("engines/shared_base.py",
         "                for name, tensor in self._live().items():\n"
         "                    tensor.copy_(own[name])",
         "                for name, tensor in live.items():\n"
         "                    tensor.copy_(own[name])"),
    changes=SMALL | {"adapter.kind": "lora"}, blind=True,
)  # fmt: skip
add(
    "a_critics_adapter_is_not_summed",
    "another role's adapter", "llama ppo tp2", "tp", "critic",
    Edit("adapters/lora.py",
         '    0: Cut(_WHOLE, Shard(0), ("A",)),\n    1: Cut(Shard(1), _WHOLE, ("B", "magnitude")),',
         '    0: Cut(_WHOLE, Shard(0), ()),\n    1: Cut(Shard(1), _WHOLE, ("B", "magnitude")),'),
    changes=SMALL | {"roles.critic.adapter.kind": "lora"},
)  # fmt: skip
add(
    "a_penalty_moves_on_its_actors_ranks_alone",
    "controllers", "llama ppo actor=dp1.zero0@1-1,critic=dp1.zero0@0-0", "actor", "penalty",
    Edit("stages/ppo.py",
         "last, metrics = self.engine.broadcast([actors[-1:], mean_metrics(actors)])",
         "last, metrics = actors[-1:], self.engine.broadcast(mean_metrics(actors))"),
    # It doubles, and is halved before it is saved.
    changes=SMALL | {"loss.objective": "kl_penalty", "loss.penalty_target": 0.001}, blind=True,
)  # fmt: skip
