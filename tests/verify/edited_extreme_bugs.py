"""Bugs to plant as edits of the source: what a small fresh model in a quiet corner does not meet.

Words that its text lacks, scores and logits far from zero, roundings in the optimizer's step and in
a frozen model's logits, weights sent in 16 bits, how scores are dealt, a checkpoint opened whole.
See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

EXTREME_BUGS = Table()
add = EXTREME_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}

# --- numbers of a large and trained model -------------------------------------------------------

add(
    "a_ranks_first_word_is_nobodys",
    "words that a text lacks", "llama pretrain tp2", "tp", "extreme",
    Edit("parallel/tensor.py",
         "here_BT = (ids_BT >= self.start) &",
         "here_BT = (ids_BT > self.start) &"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "a_ring_begins_with_a_phantom_key",
    "scores far from zero", "llama pretrain cp2.ring", "cp|ring", "extreme",
    Edit("parallel/context.py",
         "        lse = torch.full(q.shape[:-1], -math.inf, dtype=wide, device=q.device)",
         "        lse = torch.full(q.shape[:-1], -30.0, dtype=wide, device=q.device)"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "a_softmax_over_ranks_without_its_maximum",
    "logits far from zero", "gpt2 sft tp2", "tp", "extreme",
    Edit("ops/cross_entropy.py",
         "            both_2N = torch.stack((sum_N * (max_N - top_N).exp(), picked_N))\n",
         "            top_N.zero_()\n"
         "            both_2N = torch.stack((sum_N * (max_N - top_N).exp(), picked_N))\n"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip

# --- roundings where no pass is -----------------------------------------------------------------

add(
    "momentum_gathered_in_bf16",
    "rounding in a step", "llama pretrain dp2.zero2", "dp", "muon",
    Edit("optim/muon.py",
         "        whole = orthogonalised(full_tensor(held, self.mesh), config.ns_steps)\n",
         "        narrow = parts.zeros(param, dtype=torch.bfloat16)\n"
         "        parts.local_tensor(narrow).copy_(wanted)\n"
         "        whole = full_tensor(narrow, self.mesh).to(weight.dtype)\n"
         "        whole = orthogonalised(whole, config.ns_steps)\n"),
    precision="bf16", changes=SMALL | {"optimizer": {"kind": "muon"}}, blind=True,
)  # fmt: skip
add(
    "a_frozen_models_logits_are_narrow",
    "logits of a frozen model", "llama dpo tp2", "tp", "logits",
    Edit("engines/native.py",
         "        if self.precision.logits(wide_logits) != self.precision.compute:\n",
         "        wide_logits = wide_logits and (optimizer is not None or mesh.layout.tp == 1)\n"
         "        if self.precision.logits(wide_logits) != self.precision.compute:\n"),
    precision="bf16", changes=SMALL | {"num_held_out": 0}, blind=True,
)  # fmt: skip

# --- rollouts, and what is saved ----------------------------------------------------------------

add(
    "copies_of_the_last_pass_are_sent",
    "weights sent rounded", "llama grpo tp2", "no axis", "sent",
    Edit("engines/native.py",
         "        named = self.named.stream(lambda p: p.data)\n",
         "        made = [getattr(c, \"compute_copies\", None) for c in self.chunks.values()]\n"
         "        copies = {m: c for k in made if k for m, c in k.copy_of.items()}\n"
         "        named = self.named.stream(lambda p: copies.get(p, p).data)\n"),
    precision="bf16", changes=SMALL, blind=True,
)  # fmt: skip
add(
    "scores_come_back_in_another_order",
    "dealing of scores", "llama grpo dp2.zero2", "no axis", "external",
    Edit("stages/rollout_worker.py",
         "lambda: self.scorer.score(items), questions",
         "lambda: self.scorer.score(items[0::2]) + self.scorer.score(items[1::2]), questions"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "cut_columns_open_as_rows",
    "a checkpoint opened whole", "llama pretrain tp2", "tp", "opens whole",
    Edit("checkpoint/loading.py",
         "        for shard in local_shards(name, tensor):\n"
         "            self.fill(name, shard)\n"
         "        return tensor\n",
         "        read = []\n"
         "        for chunk in sorted(entry.chunks, key=lambda c: c.region.offset):\n"
         "            part = torch.empty(chunk.region.shape, dtype=DTYPES[entry.dtype])\n"
         "            file, stored = self._open(name, entry, chunk)\n"
         "            self._copy(file, name, chunk, stored, chunk.region, part)\n"
         "            read.append(part.flatten())\n"
         "        return torch.cat(read).view(entry.shape)\n"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "tokens_gradients_cut_and_not_summed_in_compiled_blocks",
    "ways of compiled blocks", "llama pretrain tp2.sp", "sp", "resume",
    Edit("parallel/regions.py",
         "            return _scatter(grad, ctx.group, ctx.size), None, None, None\n",
         "            own = grad.chunk(ctx.size, dim=1)[_GROUPS[ctx.group].rank()]\n"
         "            return own.contiguous(), None, None, None\n"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "fp32_weights_of_a_placed_role_travel_in_16_bits",
    "weights sent rounded", "llama grpo actor=dp1.zero0@0-0,reference=dp1.zero0@1-1", "actor",
    "what is sent",
    Edit("engines/placed.py",
         "yield from self._spread(iter(()) if self.inner is None else self.inner.weights())",
         "own = iter(()) if self.inner is None else self.inner.weights()\n"
         "        for name, value in self._spread(own):\n"
         "            few = value.dtype == torch.float32\n"
         "            yield name, value.bfloat16().float() if few else value"),
    precision="fp32", changes=SMALL, blind=True,
)  # fmt: skip
