"""Bugs to plant as edits of the source: counterparts of what public trackers tell of peers.

Found by what their reports say went wrong; see `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

TRACKER_BUGS = Table()
add = TRACKER_BUGS.add

add(
    "policy_loss_divided_again_by_accumulation",
    "accumulation", "llama grpo dp2.zero1", "engine|dp", "gradient",
    Edit("engines/native.py",
         "self._objective(cut, self._call(self.model, cut), sums).backward()",
         "(self._objective(cut, self._call(self.model, cut), sums) / len(cuts)).backward()"),
    seen="modelscope/ms-swift#10117",
)  # fmt: skip
add(
    "auxiliary_terms_grow_with_the_tensor_ranks",
    "loss counts", "llama reward tp2.sp", "tp", "gradient",
    Edit("engines/reduction.py",
         "parts = [s * (self.loss.weights[n] / self.totals[n]) for n, s in output.sums.items()]",
         "tp = self.mesh.layout.tp\n"
         "        parts = [\n"
         "            s * (self.loss.weights[n] * (tp if i else 1) / self.totals[n])\n"
         "            for i, (n, s) in enumerate(output.sums.items())\n"
         "        ]"),
    seen="NVIDIA/Megatron-LM#5047",
)  # fmt: skip
add(
    "no_decay_for_what_tensor_parallelism_cut",
    "weight decay", "llama pretrain tp2", "tp", "weight|update 1",
    Edit("optim/build.py",
         '"weight_decay": decay}\n        for (lr_scale, decay, _), params',
         '"weight_decay": decay if mesh is None else 0.0}\n'
         "        for (lr_scale, decay, mesh), params"),
    changes={"optimizer.weight_decay": 0.1}, seen="huggingface/transformers#48569",
)  # fmt: skip
