"""Bugs to plant in how a quantised base is made, cut, gathered and multiplied with.

The plain engine has a quantiser of its own, so that none of these changes what it computes.
"""

from __future__ import annotations

from tests.verify.adapter_bugs import AdapterBug, _bug

NF4, HOST = "ops/nf4.py", "adapters/quantise.py"

BUGS: dict[str, AdapterBug] = {
    "scales_of_a_ranks_own_columns": _bug(
        "scales", HOST, "int8.quantise(whole_OI).part(self.rows, self.columns)",
        "int8.quantise(\n            whole_OI[:, self.columns.start : self.columns.stop]\n"
        "        ).part(self.rows, range(len(self.columns)))", case="int8", layout="tp2"),
    "scales_in_bf16": _bug(
        "scales", NF4, "dequantise_blocks(self.codes_NC, self.scales(runs), dtype)",
        "dequantise_blocks(self.codes_NC, self.scales(runs).bfloat16().float(), dtype)",
        case="nf4", layout="dp2.zero3"),
    "offset_of_the_absmaxes_left_out": _bug(
        "double quantisation", NF4, "* nested_N + self.offset", "* nested_N",
        case="nf4", layout="tp2"),
    "absmaxes_rounded_to_the_nearest_byte_at_once": _bug(
        "double quantisation", NF4, "_byte_of(flat.device)[index].flatten()[: len(flat)]",
        "torch.bucketize(\n        scaled.flatten()[: len(flat)],\n"
        "        (_byte_map(flat.device)[1:] + _byte_map(flat.device)[:-1]) / 2,\n"
        "    ).to(torch.uint8)", case="wide", layout="tp2"),
    "nested_blocks_counted_from_a_ranks_first": _bug(
        "double quantisation", NF4,
        "blocks = runs.blocks(self.absmax_N.device).flatten() // NESTED_BLOCK",
        "blocks = torch.arange(len(self.absmax_N)) // NESTED_BLOCK", case="wide", layout="tp2"),
    "blocks_of_a_ranks_own_part": _bug(
        "blocks", NF4, "return [(self.first + i * self.stride) % BLOCK for i in range(self.num)]",
        "return [0 for _ in range(self.num)]", case="nf4", layout="tp2"),
    "absmaxes_of_the_first_blocks": _bug(
        "blocks", NF4, "absmax_N=self.absmax_N[blocks]", "absmax_N=self.absmax_N[: len(blocks)]",
        case="nf4", layout="tp2"),
    "halves_of_a_byte_changed_over": _bug(
        "bytes", NF4, "index_NE[:, ::2] << 4 | index_NE[:, 1::2]",
        "index_NE[:, 1::2] << 4 | index_NE[:, ::2]", case="nf4", layout="tp2"),
    "ranks_keep_each_others_bytes": _bug(
        "bytes", HOST, "[each * self.group.rank() :][:each]",
        "[each * (self._size - 1 - self.group.rank()) :][:each]", case="nf4", layout="dp2.zero3"),
    "backward_with_a_weight_in_bf16": _bug(
        "product", "ops/frozen_linear.py", "ctx.dense(ctx.dtype), None",
        "ctx.dense(torch.bfloat16).to(ctx.dtype), None", case="nf4", layout="dp2.zero2"),
    "a_shared_heads_rows_forgotten": _bug(
        "product", HOST, "return Operand(self.kept, rows)",
        "return Operand(self.kept, slice(0, rows.stop - rows.start))", case="int8", layout="tp4"),
}  # fmt: skip
