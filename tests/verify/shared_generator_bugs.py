"""Bugs to plant as edits of the source where several ranks share one generator, and in who gets
which rows of a rollout.

See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

SHARED_GENERATOR_BUGS = Table()
add = SHARED_GENERATOR_BUGS.add

SMALL = {"batch.global_batch": 4, "batch.micro_batch": 2, "rollout.tp": 2}
_JOIN = 'return join(logits_BW, self.config.vocab_size, 1, self.mesh.groups["tp"])'
_START = "        start = min(chunk_size(total, tp, 0) * rank, total)\n"
_CUT = "        return whole.narrow(dim, start, chunk_size(total, tp, rank))"
_TOKENS = "generated|external|sampled|rollout|logprobs|served"

add(
    "words_of_the_last_rank_come_first",
    "logits of a shared generator", "llama grpo tp2", "tp|rollout", _TOKENS,
    Edit("rollout/sharded.py", _JOIN, f"{_JOIN}.roll(logits_BW.shape[1], dims=1)"),
    changes=SMALL, whole=True,
)  # fmt: skip
add(
    "one_rank_serves_the_weights_that_came_first",
    "weights of a shared generator", "llama grpo dp2.zero2", "dp|rollout", _TOKENS,
    Edit("rollout/sharded.py",
         _CUT,
         "        part = whole.narrow(dim, start, chunk_size(total, tp, rank))\n"
         "        if rank == 0:\n"
         "            return part\n"
         '        first = self.__dict__.setdefault("_first", {})\n'
         "        return first.setdefault(name, part.clone())"),
    changes=SMALL, whole=True,
)  # fmt: skip
add(
    "keys_and_values_of_another_ranks_heads",
    "heads of a shared generator", "llama grpo dp2.zero1", "dp|rollout", _TOKENS,
    Edit("rollout/sharded.py",
         _START,
         '        if ".attn.k." in name or ".attn.v." in name:\n'
         "            rank = (rank + 1) % tp\n" + _START),
    changes=SMALL, whole=True,
)  # fmt: skip
add(
    "the_second_ranks_groups_are_asked_for_twice",
    "dealing to shared generators", "llama grpo dp2.zero2.tp2", "dp|tp|rollout",
    f"{_TOKENS}|question|dealing",
    Edit("stages/served.py",
         "return Served(generator, rank // said.tp, world // said.tp, rank % said.tp)",
         "return Served(generator, rank % said.tp, world // said.tp, rank // said.tp)"),
    changes=SMALL, whole=True,
)  # fmt: skip
add(
    "rows_of_a_mini_batch_go_to_the_ranks_of_the_next",
    "rows on their way", "llama grpo dp2.zero2", "dp", "rollout|sampled|logprobs|update|dealing",
    Edit("stages/row_holders.py",
         "for row, part in zip(some, of_rank.split(n.tolist()), strict=True)",
         "for row, part in zip(reversed(some), of_rank.split(n.tolist()), strict=True)"),
    changes={"batch.global_batch": 8, "batch.micro_batch": 2},
)  # fmt: skip
