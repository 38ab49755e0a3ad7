"""Bugs to plant in adapters, as edits of the source.

The plain engine has adapters of its own, so that none of these changes what it computes.
"""

from __future__ import annotations

import dataclasses

from tests.verify.edits import Edit

LORA, START, MERGE, BOTTLENECK = (
    f"adapters/{name}.py" for name in ("lora", "start", "merge", "bottleneck")
)


@dataclasses.dataclass(frozen=True)
class AdapterBug:
    """A mistake, its family, and where it shows: ``case`` is one of the test's."""

    kind: str
    edits: tuple[Edit, ...]
    case: str = "dora"
    layout: str = "tp2.sp"


def _bug(kind: str, file: str, old: str, new: str, **where: str) -> AdapterBug:
    return AdapterBug(kind, (Edit(file, old, new),), **where)


BUGS: dict[str, AdapterBug] = {
    "not_scaled": _bug(
        "scale", LORA, "self.scaling, self.p, self.keys = config.scaling,",
        "self.scaling, self.p, self.keys = 1.0,"),
    "scaled_by_the_root_of_the_rank_or_not": _bug(
        "scale", "adapters/config.py", "(self.rank**0.5 if self.rslora",
        "(self.rank**0.5 if not self.rslora"),
    "b_not_zero_at_the_start": _bug(
        "start", START, '"B": torch.zeros(outputs, rank)}',
        '"B": normal("B", (outputs, rank), std)}', case="lora"),
    "magnitudes_of_columns": _bug(
        "start", START, "torch.linalg.vector_norm(weight, dim=1)",
        "torch.linalg.vector_norm(weight, dim=0).mean().expand(outputs)"),
    "singular_vectors_not_taken_off": _bug(
        "start", START, '"A0": a, "B0": b}', '"A0": a, "B0": 0 * b}'),
    "dropout_in_what_is_taken_off": _bug(
        "dropout", LORA, "F.linear(F.linear(x_BTI, less[0]), less[1])",
        "F.linear(F.linear(noisy_BTI, less[0]), less[1])"),
    "dropout_keys_by_local_feature": _bug(
        "dropout", LORA, "self.first_input = axis.rank * -(-inputs // axis.size)",
        "self.first_input = 0"),
    "one_mask_for_all_layers": _bug(
        "dropout", LORA, "rng.key(0, MARK, target.path)", "rng.key(0, MARK)"),
    "keys_of_the_first_micro_batch": _bug(
        "dropout", LORA, "            inside.value_BT = context.rng_keys_BT\n",
        "            if inside.value_BT is None:\n"
        "                inside.value_BT = context.rng_keys_BT\n"),
    "partial_sum_of_a_missing": _bug(
        "partial sums", LORA, '0: Cut(_WHOLE, Shard(0), ("A",)),', "0: Cut(_WHOLE, Shard(0), ()),"),
    "partial_sum_of_b_missing": _bug(
        "partial sums", LORA, '1: Cut(Shard(1), _WHOLE, ("B", "magnitude")),',
        '1: Cut(Shard(1), _WHOLE, ("magnitude",)),'),
    "parts_of_a_summed_as_if_partial": _bug(
        "partial sums", LORA, '1: Cut(Shard(1), _WHOLE, ("B", "magnitude")),',
        '1: Cut(Shard(1), _WHOLE, ("A", "B", "magnitude")),'),
    "shared_heads_sum_is_missing": _bug(
        "partial sums", LORA, 'None: Cut(_WHOLE, _WHOLE, ("A", "B", "magnitude")),',
        'None: Cut(_WHOLE, _WHOLE, ("A",)),', case="shared head"),
    "frozen_base_is_updated": _bug(
        "frozen", "adapters/targets.py", "    model.requires_grad_(False)\n    if",
        "    model.requires_grad_(True)\n    if", case="lora", layout="dp2.zero2"),
    "frozen_by_the_layer_behind": _bug(
        "frozen", "adapters/targets.py", "< model.num_layers - last", "<= model.num_layers - last",
        case="last layer", layout="dp2.zero2"),
    "norms_of_a_ranks_part": _bug(
        "norms", LORA,
        "(square_O if self.parts is None else regions.leave(square_O, self.parts)).sqrt()",
        "square_O.sqrt()"),
    "gradient_through_the_norm": _bug(
        "norms", LORA, "        with torch.no_grad():\n            norm_O",
        "        with torch.enable_grad():\n            norm_O"),
    "rows_of_another_ranks_head": _bug(
        "rows", LORA, "A, B = tensor.local(self.A), tensor.local(self.B)[rows]",
        "A, B = tensor.local(self.A), tensor.local(self.B)[: out_BTO.shape[-1]]",
        case="two shared heads", layout="tp4"),
    "merged_without_the_scale": _bug(
        "merging", MERGE, "update = config.of(target.path).scaling * update",
        "update = update * 1.0"),
    "merged_by_the_norms_of_columns": _bug(
        "merging", MERGE, "torch.linalg.vector_norm(result, dim=1, keepdim=True)",
        "torch.linalg.vector_norm(result, dim=0, keepdim=True)[:, :1]"),
    "served_without_what_was_taken_off": _bug(
        "merging", MERGE, 'if "A0" in parts:', 'if "A1" in parts:'),
    "bottleneck_not_scaled": _bug(
        "bottleneck", BOTTLENECK, "return self.scaling * F.linear(hidden_BTM,",
        "return F.linear(hidden_BTM,", case="parallel"),
    "bottleneck_partial_bias_missing": _bug(
        "bottleneck", BOTTLENECK, '        ("up_bias",),\n', "        (),\n", case="parallel"),
    "bottleneck_of_each_ranks_tokens_not_summed": _bug(
        "bottleneck", BOTTLENECK, '("down", "down_bias", "up", "up_bias"),\n    ),',
        '("down_bias", "up", "up_bias"),\n    ),', case="sequential"),
    "bottleneck_bias_of_every_rank": _bug(
        "bottleneck", BOTTLENECK, "return out_BTD + self.product(self.given_BTD)",
        "return out_BTD + self.product(self.given_BTD) + self.bias()", case="parallel"),
    "bottleneck_of_what_stands_before_attention": _bug(
        "bottleneck", BOTTLENECK, "return out_BTD + adapter.product(out_BTD) + adapter.bias()",
        "return out_BTD + adapter.product(x_BTD) + adapter.bias()", case="sequential",
        layout="dp2.zero3"),
    "bottleneck_far_from_nothing_at_the_start": _bug(
        "bottleneck", BOTTLENECK, 'InitSpec("normal", self.config.init_std)',
        'InitSpec("normal")', case="sequential", layout="dp2.zero3"),
}  # fmt: skip
