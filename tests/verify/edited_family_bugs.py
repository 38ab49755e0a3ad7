"""Bugs to plant as edits of the source: in what the families of models have beyond Llama.

Norms over heads that ranks hold in parts, norms behind branches, soft caps, windows by layer.
See `edited_bugs` for the fields; a model that the suite does not have is one of `support.families`.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

FAMILY_BUGS = Table()
add = FAMILY_BUGS.add

add(
    "squares_of_a_cut_norm_not_summed",
    "norms over cut heads", "olmo2 pretrain tp2", "tp", "q_norm|k_norm",
    Edit("parallel/norms.py",
         "mean = regions.enter(regions.leave(own, self.axis.group), self.axis.group)",
         "mean = own * self.axis.size"),
)  # fmt: skip
add(
    "a_cut_norm_forgets_what_it_owes_to_the_others",
    "norms over cut heads", "olmo2 pretrain tp2", "tp", "attn.q|attn.k|gradient",
    Edit("parallel/norms.py",
         "mean = regions.enter(regions.leave(own, self.axis.group), self.axis.group)",
         "mean = regions.leave(own, self.axis.group)"),
)  # fmt: skip
add(
    "a_shared_key_heads_norm_has_one_ranks_gradient",
    "norms over cut heads", "olmo2 pretrain tp4", "tp", "k_norm",
    Edit("parallel/norms.py",
         '        self.partial = ("weight",) if shared else ()',
         "        self.partial = ()"),
)  # fmt: skip
add(
    "a_shared_key_head_is_scaled_as_its_neighbour",
    "norms over cut heads", "olmo2 pretrain tp4", "tp", "k_norm",
    Edit("parallel/norms.py",
         "            start = axis.rank // copies * own",
         "            start = axis.rank % copies * own"),
)  # fmt: skip
add(
    "norms_behind_branches_not_summed_over_tokens",
    "norms behind branches", "gemma2 pretrain tp2.sp", "sp|tp", "post_norm",
    Edit("parallel/tensor.py",
         'style == "sequence", style == "per_head" or axis.sequence',
         'style == "sequence", style == "per_head" or (axis.sequence and style != "own_tokens")'),
)  # fmt: skip
add(
    "a_ring_forgets_the_soft_cap",
    "soft caps", "gemma2 pretrain cp2.ring", "cp", "attn",
    Edit("parallel/context.py",
         "            soft_cap=self.soft_cap,",
         "            soft_cap=None,"),
    changes={"model.attn_soft_cap": 50.0},  # as released: what small weights never reach
)  # fmt: skip
add(
    "sinks_of_cut_heads_do_not_learn",
    "sinks", "granite_swa pretrain tp2", "tp", "sinks",
    Edit("parallel/norms.py",
         '        """Those of this rank\'s heads."""\n        return local(self.weight)',
         '        """Those of this rank\'s heads."""\n        return local(self.weight).detach()'),
)  # fmt: skip
