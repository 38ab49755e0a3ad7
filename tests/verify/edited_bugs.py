"""Bugs to plant as edits of the source: in how a model is cut, computed, reduced and updated.

Each is a mistake that has been made in such code, or could be in the next change of ours; those
that are known from elsewhere say where. None of them changes what the plain engine of one process
computes: verify could see no mistake that both sides share. Those of the path around the engine
(data, rates, figures, rollouts, resume, precision) are in `edited_path_bugs`.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from shardwise.verify import suite
from tests.support.families import small
from tests.verify.edits import Edit


@dataclasses.dataclass(frozen=True)
class EditedBug:
    """A mistake, where it shows, and what verify should say of it.

    ``kind``: the family of mistakes. ``first``: the first difference names one of these. ``axis``:
    what should be suspected, a part of the layout or of the path. ``changes``: to the recipe, by
    dotted key; ``model.`` is the model's section, ``evaluations`` are the run's, all else is the
    stage's. ``seen``: where it was made before, on a public tracker. ``blind``: recorded calls
    alone do not show it. ``shared``: one process runs the same lines, so the oracle has it, too.
    ``whole``: it shows where a run is saved, goes on or is evaluated.
    """

    kind: str
    model: str
    stage: str
    layout: str
    axis: str
    first: tuple[str, ...]
    edits: tuple[Edit, ...]
    precision: str = "fp64"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seen: str = ""
    blind: bool = False
    shared: bool = False
    whole: bool = False

    @property
    def resumes(self) -> bool:
        """Whether updates alone do not show it."""
        return self.whole or self.kind in ("resume", "resharding")

    def is_named_in(self, sentence: str) -> bool:
        """Whether a verdict's sentence names what is wrong, and where to look for it."""
        words = {word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", sentence)}
        axes = self.axis.split("|")
        known = any(a in words or (" " in a and a in sentence) for a in axes)
        return known and any(word in sentence for word in self.first)

    def recipe(self) -> dict[str, Any]:
        """The suite's, with this stage alone."""
        recipe = suite.recipe(self.model if self.model in suite.MODELS else "llama")
        if self.model not in suite.MODELS:
            recipe["model"] = small(self.model)
        stage = copy.deepcopy(suite.STAGES[self.stage])
        recipe["stages"] = [stage]
        for key, value in self.changes.items():
            inner = recipe if key.startswith(("model.", "evaluations")) else stage
            *path, last = key.split(".")
            for name in path:
                inner = inner.setdefault(name, {})
            inner[last] = value
        return recipe


class Table(dict[str, EditedBug]):
    """Bugs by name."""

    def add(
        self,
        name: str,
        kind: str,
        where: str,
        axis: str,
        first: str,
        *edits: Edit,
        **more: Any,
    ) -> None:
        """``where``: model, stage and layout; ``first``: alternatives, parted by bars."""
        assert name not in self
        model, stage, layout = where.split()
        words = tuple(first.split("|"))
        self[name] = EditedBug(kind, model, stage, layout, axis, words, edits, **more)


BUGS = Table()
add = BUGS.add

# --- tensor and sequence parallel ---------------------------------------------------------------

add(
    "norms_inside_heads_summed_only_with_sequence_parallelism",
    "partial gradients", "llama-untied-odd pretrain tp2", "tp", "q_norm|k_norm",
    Edit("parallel/tensor.py",
         'style == "sequence", style == "per_head" or axis.sequence',
         'style == "sequence", axis.sequence'),
    seen="NVIDIA/Megatron-LM#7452, finding 11",
)  # fmt: skip
add(
    "biases_behind_the_scatter_not_reduced",
    "partial gradients", "gpt2 pretrain tp2.sp", "sp", "bias",
    Edit("parallel/tensor.py",
         'self.partial = ("bias",) if axis.sequence else ()',
         "self.partial = ()"),
)  # fmt: skip
add(
    "position_table_gradient_not_reduced",
    "partial gradients", "gpt2 pretrain tp2.sp", "sp", "pos_embed",
    Edit("parallel/tensor.py",
         'self.partial = ("weight",) if axis.sequence else ()',
         "self.partial = ()"),
)  # fmt: skip
add(
    "final_norm_gradient_not_reduced",
    "partial gradients", "llama pretrain tp2.sp", "sp", "gradient norm.weight|norm",
    Edit("engines/named_parameters.py",
         "for n, g in grads.items() if n in self.partial]",
         'for n, g in grads.items() if n in self.partial and n.startswith("layers")]'),
    seen="NVIDIA/Megatron-LM#1446",
)  # fmt: skip
add(
    "partial_gradients_averaged",
    "partial gradients", "llama pretrain tp4", "tp", "attn.k|attn.v",
    Edit("parallel/tensor.py",
         "grad.copy_(total.view_as(grad))",
         "grad.copy_(total.view_as(grad) / mesh.layout.tp)"),
    seen="EleutherAI/gpt-neox#1259",
)  # fmt: skip
add(
    "ranks_of_the_vocabulary_begin_at_rounded_down_rows",
    "vocabulary", "llama-untied-odd pretrain tp2", "tp", "embed|layers.0",
    Edit("parallel/tensor.py",
         "self.start = axis.rank * -(-old.num_embeddings // axis.size)",
         "self.start = axis.rank * (old.num_embeddings // axis.size)"),
)  # fmt: skip
add(
    "logits_offset_of_an_even_vocabulary",
    "vocabulary", "llama-untied-odd sft tp2", "tp", "loss|head",
    Edit("engines/inputs.py",
         "words = -(-size // layout.tp)",
         "words = size // layout.tp"),
)  # fmt: skip
add(
    "shared_kv_heads_dealt_round_robin",
    "KV heads", "llama pretrain tp4", "tp", "attn",
    Edit("parallel/tensor.py",
         "start = axis.rank * num_heads // axis.size * width",
         "start = axis.rank % num_heads * width"),
)  # fmt: skip
add(
    "query_heads_of_a_rank_meet_kv_heads_in_turn",
    "KV heads", "llama pretrain tp2", "tp", "attn",
    Edit("parallel/tensor.py",
         "            module.head_offset = axis.rank * model.config.num_heads // axis.size",
         "            module.head_offset = axis.rank * model.config.num_heads // axis.size\n"
         "            module.core = lambda q, *kv, _of=module.core, **o: _of(\n"
         "                q, *(t.repeat(1, q.shape[1] // t.shape[1], 1, 1) for t in kv[:2]),\n"
         "                *kv[2:], **o)"),
    changes={"model.num_kv_heads": 4},
)  # fmt: skip
add(
    "tokens_of_a_rank_taken_in_strides",
    "token order", "gpt2 pretrain tp2.sp", "sp", "pos_embed|embed|drop",
    Edit("parallel/swapped.py",
         "return x_BT.chunk(self.size, dim=1)[self.rank] if self.sequence else x_BT",
         "return x_BT[:, self.rank :: self.size] if self.sequence else x_BT"),
)  # fmt: skip
add(
    "scalar_head_reads_the_first_features",
    "scalar head", "llama reward tp2", "tp", "head",
    Edit("parallel/tensor.py",
         "own = x_BTI.narrow(-1, self.axis.rank * width, local(self.weight).shape[1])",
         "own = x_BTI.narrow(-1, 0, local(self.weight).shape[1])"),
)  # fmt: skip
add(
    "sums_over_data_ranks_take_tensor_ranks_in",
    "groups", "llama dpo tp2.sp", "tp", "logprobs|forward pass",
    Edit("engines/native.py",
         'sum_over(vector, self.mesh.groups["dp"]).tolist()]',
         'sum_over(vector, self.mesh.groups["stage"]).tolist()]'),
    seen="huggingface/transformers#39674",
)  # fmt: skip

# --- data parallel and ZeRO ---------------------------------------------------------------------

add(
    "accumulated_gradients_lost_at_each_reduction",
    "accumulation", "llama pretrain dp2.zero2", "zero", "gradient",
    Edit("engines/native.py",
         "            self._objective(cut, self._call(self.model, cut), sums).backward()",
         "            if self.mesh.layout.zero == 2 and self.optimizer:\n"
         "                self.optimizer.zero_grad(set_to_none=True)\n"
         "            self._objective(cut, self._call(self.model, cut), sums).backward()"),
    changes={"batch.micro_batch": 1, "batch.global_batch": 8},
    seen="deepspeedai/DeepSpeed#7718",
)  # fmt: skip
add(
    "last_micro_batch_never_reduced",
    "accumulation", "llama pretrain dp2.zero1", "zero", "gradient",
    Edit("engines/native.py",
         "data.before_microbatch(self.model, self.mesh, is_last=is_last)",
         "data.before_microbatch(self.model, self.mesh, is_last=i == max(0, len(cuts) - 2))"),
    changes={"batch.micro_batch": 1, "batch.global_batch": 8},
)  # fmt: skip
add(
    "divided_by_the_number_of_micro_batches_again",
    "accumulation", "llama pretrain dp2.zero1", "accumulation|dp", "gradient",
    Edit("engines/native.py",
         "self._objective(cut, self._call(self.model, cut), sums).backward()",
         "(self._objective(cut, self._call(self.model, cut), sums) / len(cuts)).backward()"),
    changes={"batch.micro_batch": 1, "batch.global_batch": 8},
)  # fmt: skip
add(
    "gradients_of_the_last_update_kept",
    "accumulation", "llama pretrain dp2.zero0", "zero", "gradient|grad_norm|clip norm",
    Edit("engines/native.py",
         "        self.optimizer.zero_grad(set_to_none=True)",
         "        if self.mesh.layout.zero or self.mesh.alone:\n"
         "            self.optimizer.zero_grad(set_to_none=True)"),
    seen="deepspeedai/DeepSpeed#7839",
)  # fmt: skip
add(
    "gradients_divided_by_a_scale_that_no_loss_had",
    "loss scale", "llama pretrain dp2.zero0", "zero", "norm|gradient",
    Edit("engines/native.py",
         "        scale = self.scale.value if self.scale else 1.0\n        norm /= scale",
         "        scale = self.scale.value if self.scale else 1.0\n"
         "        if not self.mesh.alone and not self.mesh.layout.zero:\n"
         "            scale = 2.0**16\n"
         "        norm /= scale"),
    seen="deepspeedai/DeepSpeed#7839",
)  # fmt: skip
add(
    "blocks_average_their_gradients",
    "reductions", "llama pretrain dp2.zero3", "zero", "gradient",
    Edit("parallel/data.py",
         "in fsdp_modules(model):\n        module.set_gradient_divide_factor(1.0)",
         "in fsdp_modules(model)[:1]:\n        module.set_gradient_divide_factor(1.0)"),
)  # fmt: skip
add(
    "replicas_reduced_on_resharding_stages_alone",
    "reductions", "llama pretrain dp4.hsdp2.zero2", "hsdp|zero|dp", "gradient",
    Edit("parallel/data.py",
         "    model.set_is_last_backward(last)",
         "    model.set_is_last_backward(last)\n"
         "    model.set_requires_all_reduce(row.reshard_after_forward)"),
    seen="NVIDIA/Megatron-LM#3670",
)  # fmt: skip
add(
    "counts_of_one_data_rank",
    "loss counts", "llama sft dp2.zero2", "dp", "loss|gradient|count",
    Edit("engines/reduction.py",
         'parts = sum_over(local, mesh.groups["dp"]).tolist()',
         "parts = (local * mesh.data_size).tolist()"),
    seen="NVIDIA/Megatron-LM#7452, finding 3",
)  # fmt: skip

# --- the norm of all gradients ------------------------------------------------------------------

add(
    "norm_without_the_other_pipeline_stages",
    "clip norm", "llama pretrain pp2.1f1b", "pp", "norm",
    Edit("engines/named_parameters.py",
         'sum_over(local, self.mesh.groups["unique"])',
         'sum_over(local, self.mesh.groups["stage"])'),
    seen="NVIDIA/Megatron-LM#5916",
)  # fmt: skip
add(
    "norm_without_the_other_tensor_ranks",
    "clip norm", "llama pretrain dp2.zero2.tp2", "tp", "norm",
    Edit("engines/named_parameters.py",
         'sum_over(local, self.mesh.groups["unique"])',
         'sum_over(local, self.mesh.groups["shard"])'),
    seen="NVIDIA/Megatron-LM#5916",
)  # fmt: skip
add(
    "whole_parameters_counted_by_every_tensor_rank",
    "clip norm", "gpt2 pretrain tp2", "tp", "norm",
    Edit("engines/named_parameters.py",
         'if layout.tp > 1 and place["tp"] > 0 and tp_dim(parameter, self.mesh) is None:',
         'if layout.tp > 1 and place["tp"] > 0 and tp_dim(parameter, self.mesh) == -1:'),
    seen="NVIDIA-NeMo/RL#3788",
)  # fmt: skip
add(
    "tied_embedding_counted_at_both_ends",
    "clip norm", "llama pretrain pp2.1f1b", "pp", "norm",
    Edit("engines/named_parameters.py",
         'return not (self.shares_tied and name == TIED and place["pp"] > 0)',
         "return True"),
    seen="NVIDIA/Megatron-LM#7227",
)  # fmt: skip
add(
    "each_shard_clipped_by_its_own_norm",
    "clip norm", "llama pretrain dp2.zero3", "zero|dp", "norm",
    Edit("engines/named_parameters.py",
         'return math.sqrt(sum_over(local, self.mesh.groups["unique"]).item())',
         "return math.sqrt(local.item())"),
    seen="hiyouga/LlamaFactory#10640",
)  # fmt: skip

# --- pipeline -----------------------------------------------------------------------------------

add(
    "layer_at_an_uneven_border_computed_twice",
    "pipeline split", "llama pretrain pp2.1f1b", "pp", "layers",
    Edit("parallel/pipeline.py",
         "return [range(a, b) for a, b in zip((0, *stops), stops)]",
         "twice = int(num_layers % parts > 0)\n"
         "    return [range(a, min(b + twice, num_layers)) for a, b in zip((0, *stops), stops)]"),
    changes={"model.num_layers": 5},
)  # fmt: skip
add(
    "home_of_a_layer_found_by_one_digit",
    "two-digit layers", "llama grpo pp2.1f1b", "pp", "layers.1|weights|tokens|generated|sampled",
    Edit("engines/named_parameters.py",
         "        found: dict[str, tuple[torch.Size, int, bool]] = {}",
         "        found: dict[str, tuple[torch.Size, int, bool]] = {}\n"
         "        at: dict[str, int] = {}"),
    Edit("engines/named_parameters.py",
         "found.setdefault(name, (parameter.shape, home[number], parameter.requires_grad))",
         'stem = name[:8] if name.startswith("layers.") else name\n'
         "                found.setdefault(\n"
         "                    name, (parameter.shape, at.setdefault(stem, home[number]),\n"
         "                           parameter.requires_grad))"),
    changes={"model.num_layers": 12},
)  # fmt: skip
add(
    "later_stages_read_another_micro_batchs_mask",
    "micro-batch order", "llama pretrain pp2.1f1b", "pp", "layers",
    Edit("engines/native.py",
         "self.engine._call(self.engine.chunks[chunk], self.cuts[microbatch], x)",
         "self.engine._call(\n"
         "            self.engine.chunks[chunk],\n"
         "            self.cuts[microbatch if chunk == 0 else len(self.cuts) - 1 - microbatch],\n"
         "            x,\n"
         "        )"),
)  # fmt: skip
add(
    "mirror_of_a_tied_embedding_grows_stale",
    "tied embeddings", "llama pretrain pp2.zbv", "pp", "head|embed",
    Edit("engines/named_parameters.py",
         "local_tensor(self.mirror.data).copy_(local_tensor(self.parameters[TIED].data))",
         "local_tensor(self.mirror.data).copy_(local_tensor(self.mirror.data))"),
)  # fmt: skip
add(
    "ends_of_a_pipeline_keep_their_own_tied_gradient",
    "tied embeddings", "llama pretrain pp4.1f1b", "pp", "embed",
    Edit("engines/named_parameters.py",
         'comm.all_reduce(grads[TIED], self.mesh.groups["ends"], "pp")',
         'comm.all_reduce(grads[TIED].clone(), self.mesh.groups["ends"], "pp")'),
    seen="NVIDIA/Megatron-LM#844",
)  # fmt: skip
add(
    "pipeline_reduces_before_its_last_micro_batch",
    "accumulation", "llama pretrain dp2.zero1.pp2.interleavedzb.v2", "pp|zero", "gradient",
    Edit("engines/native.py",
         "done = self.open[chunk] == 0",
         "done = self.open[chunk] == min(1, len(self.cuts) - 1)"),
)  # fmt: skip
add(
    "last_weight_product_of_later_micro_batches_lost",
    "split backward", "llama pretrain pp2.interleavedzb.v2", "pp", "gradient",
    Edit("parallel/pipeline.py",
         "for product in self.later.pop((chunk, microbatch)):",
         "for product in self.later.pop((chunk, microbatch))[: -1 if microbatch else None]:"),
)  # fmt: skip
add(
    "results_come_from_the_last_rank_also_in_a_v",
    "pipeline order", "llama pretrain pp2.zbv", "pp", "loss|reduction.py",
    Edit("parallel/mesh.py",
         "return 0 if in_a_v else self.layout.pp - 1",
         "return self.layout.pp - 1"),
)  # fmt: skip

# --- context parallel ---------------------------------------------------------------------------

add(
    "zigzag_chunks_gathered_in_rank_order",
    "ring order", "llama grpo cp2.ring", "cp", "logprobs|forward pass",
    Edit("parallel/context.py",
         "return torch.cat(ranks).argsort()",
         "return torch.cat(ranks)"),
)  # fmt: skip
add(
    "gradients_of_keys_stop_one_rank_from_home",
    "ring order", "llama pretrain cp2.ring", "cp", "attn.k|attn.v|gradient",
    Edit("parallel/context.py",
         "        if size > 1:  # a rank cannot send to itself",
         "        if size > 2:"),
    seen="NVIDIA/TransformerEngine#1557",
)  # fmt: skip
add(
    "positions_run_on_through_packed_documents",
    "positions", "gpt2 pretrain cp2.ring", "cp", "pos_embed|embed",
    Edit("engines/inputs.py",
         '"position_ids_BT": self.own(batch.position_ids_BT),',
         '"position_ids_BT": self.own(batch.position_ids_BT)\n'
         "            if self.mesh.layout.cp == 1 or self.index_t is None\n"
         "            else self.index_t.expand(batch.num_rows, -1),"),
)  # fmt: skip
add(
    "window_one_token_wider_round_the_ring",
    "masks", "llama pretrain cp2.ring", "cp", "attn|layers",
    Edit("parallel/context.py",
         "allowed = allowed & (ahead < self.reach)",
         "allowed = allowed & (ahead <= self.reach)"),
    changes={"model.sliding_window": 8},
)  # fmt: skip
add(
    "first_document_seen_by_all_round_the_ring",
    "masks", "llama sft cp2.ring", "cp", "attn|layers",
    Edit("parallel/context.py",
         "plain.visible(query[:, None, :, None], key[:, None, None])",
         "(\n"
         "                plain.visible(query[:, None, :, None], key[:, None, None])\n"
         "                | (key == 0)[:, None, None]\n"
         "            )"),
)  # fmt: skip
add(
    "padding_cut_off_at_the_front",
    "padding", "llama pretrain cp2.ring", "cp", "loss",
    Edit("ops/logits.py",
         "return whole_BT[:, : self.num_tokens]",
         "return whole_BT[:, self.padded - self.num_tokens :]"),
    changes={"batch.seq_len": 30},
)  # fmt: skip
add(
    "padding_of_sequence_parallelism_put_in_front",
    "padding", "llama pretrain tp2.sp", "sp|tp", "loss|head|gradient",
    Edit("ops/logits.py",
         "(*behind, 0, self.padded - self.num_tokens))[:, self.index_t]",
         "(*behind, self.padded - self.num_tokens, 0))[:, self.index_t]"),
    changes={"batch.seq_len": 31},
)  # fmt: skip
add(
    "shared_kv_heads_repeated_in_turn_for_ulysses",
    "KV heads", "llama pretrain cp4.ulysses", "cp", "attn",
    Edit("parallel/context.py",
         "k_BGtK = k_BGtK.repeat_interleave(repeats, dim=1)",
         "k_BGtK = k_BGtK.repeat(1, repeats, 1, 1)"),
    Edit("parallel/context.py",
         "v_BGtK = v_BGtK.repeat_interleave(repeats, dim=1)",
         "v_BGtK = v_BGtK.repeat(1, repeats, 1, 1)"),
)  # fmt: skip
add(
    "heads_of_ulysses_dealt_in_strides",
    "head order", "llama-untied-odd pretrain cp2.ulysses", "cp", "attn",
    Edit("parallel/context.py",
         "sent = torch.stack(x.chunk(size, dim=cut))",
         "strided = [x[:, r::size] for r in range(size)]\n"
         "        sent = torch.stack(strided if cut == 1 else list(x.chunk(size, dim=cut)))"),
)  # fmt: skip
add(
    "ulysses_drops_by_local_head_numbers",
    "dropout keys", "gpt2 pretrain cp2.ulysses", "cp", "attn",
    Edit("parallel/context.py",
         "head_offset=head_offset + group.rank() * (num_heads // size),",
         "head_offset=head_offset,"),
)  # fmt: skip
add(
    "dropout_keys_by_local_token",
    "dropout keys", "gpt2 pretrain cp2.ring", "cp", "embed|drop",
    Edit("engines/inputs.py",
         "                seed, step, stage, batch.sample_ids_B, index_t\n",
         "                seed, step, stage, batch.sample_ids_B, torch.arange(len(index_t))\n"),
)  # fmt: skip
add(
    "loss_told_by_every_context_rank",
    "figures", "llama pretrain cp2.ring", "cp", "loss",
    Edit("parallel/mesh.py",
         'return self.is_last_stage and self.place["cp"] == self.place["tp"] == 0',
         'return self.is_last_stage and self.place["tp"] == 0'),
    seen="huggingface/transformers#39674",
)  # fmt: skip
add(
    "counts_of_one_context_ranks_tokens",
    "loss counts", "llama sft cp2.ring", "cp", "loss|gradient|count",
    Edit("engines/native.py",
         "        sums = LossSums(loss, self.mesh, [c.batch for c in cuts])",
         "        sums = LossSums(loss, self.mesh, [c.batch for c in cuts])\n"
         "        if self.mesh.layout.cp > 1:\n"
         "            here = sum(float(c.own(c.batch.loss_mask_BT).sum()) for c in cuts)\n"
         "            total = max(1.0, here * self.mesh.layout.cp)\n"
         "            sums.totals = dict.fromkeys(sums.totals, total)"),
    seen="NVIDIA/Megatron-LM#7452, finding 9",
)  # fmt: skip
