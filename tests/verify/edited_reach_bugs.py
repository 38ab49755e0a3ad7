"""Bugs to plant as edits of the source: ways that a small recipe takes only where it is made to.

Blocks that share scales or a generator, bounds that bind, layers that fall back, weights that move
by more than 16 bits round away, an infinity that another rank than the first has.
See `edited_bugs` for the fields.
"""

from __future__ import annotations

from tests.verify.edited_bugs import Table
from tests.verify.edits import Edit

REACH_BUGS = Table()
add = REACH_BUGS.add

SMALL = {"batch.global_batch": 8, "batch.micro_batch": 2}
LORA = {"adapter.kind": "lora", "adapter.rank": 16, "adapter.alpha": 32.0}
DELAYED = {"engine.fp8.recipe": "delayed"}

# --- blocks that numbers depend on --------------------------------------------------------------

add(
    "scales_of_scales_looked_up_by_the_ranks_own_block_number",
    "blocks of quantised weights", "llama sft tp2", "tp", "initial",
    Edit("ops/nf4.py",
         "        blocks = runs.blocks(self.absmax_N.device).flatten() // NESTED_BLOCK\n",
         "        blocks = torch.arange(len(self.absmax_N)) // NESTED_BLOCK\n"),
    changes=LORA | {"adapter.quantise": "nf4"},
)  # fmt: skip
add(
    "blocks_of_random_numbers_counted_from_a_ranks_first_row",
    "blocks of initial weights", "llama pretrain dp2.zero3", "dp|zero", "initial",
    Edit("models/common/init.py",
         '*shape, index))\n',
         '*shape, index - start // block))\n'),
    changes=SMALL,
)  # fmt: skip
add(
    "largest_moments_of_blocks_not_agreed_upon_for_an_adapter",
    "blocks of 8-bit moments", "llama sft dp2.zero2", "dp|zero", "absmax",
    Edit("optim/blockwise.py",
         "    parts.maximum(absmax, param)\n",
         "    absmax = absmax\n"),
    changes=LORA | {"optimizer.kind": "adamw8bit"},
)  # fmt: skip
add(
    "an_amax_is_never_forgotten",
    "window of amaxes", "llama pretrain dp2.zero2", "dp2|engine", "history",
    Edit("ops/fp8.py",
         "    rolled_SH3 = torch.roll(history_SH3, -1, dims=1)\n"
         "    rolled_SH3[:, -1] = amax_S3\n",
         "    rolled_SH3 = torch.roll(history_SH3, -1, dims=1)\n"
         "    rolled_SH3[:, -1] = torch.maximum(amax_S3, history_SH3.amax(dim=1))\n"),
    changes=SMALL | DELAYED,
)  # fmt: skip

# --- bounds that bind ---------------------------------------------------------------------------

add(
    "gradients_clipped_by_the_norm_of_a_ranks_part",
    "clipping", "llama pretrain dp2.zero2", "dp|zero", "weight|moment",
    Edit("engines/native.py",
         "            if factor != 1.0 or scale != 1.0:\n",
         "            if factor != 1.0:\n"
         "                parts = torch._foreach_norm(self.named.local_gradients())\n"
         "                own = float(torch.stack(parts).norm()) / scale\n"
         "                factor = min(1.0, limit / (own + 1e-6))\n"
         "            if factor != 1.0 or scale != 1.0:\n"),
    changes=SMALL | {"engine.max_grad_norm": 10.0},
)  # fmt: skip
add(
    "adam_keeps_its_librarys_own_epsilon",
    "bounds of optimizers", "llama pretrain dp2.zero1", "dp2|engine", "weight",
    Edit("optim/torch_kinds.py",
         "betas=betas, eps=config.eps)",
         "betas=betas, eps=1e-8)"),
    changes=SMALL,
)  # fmt: skip
add(
    "least_second_moments_applied_before_the_sum",
    "bounds of optimizers", "llama pretrain dp2.zero2", "dp|zero", "weight",
    Edit("optim/factored.py",
         "            mean = parts.total(row.sum(), param, 0) / rows\n",
         "            least = config.eps1 * rows\n"
         "            mean = parts.total(row.sum().clamp(min=least), param, 0) / rows\n"),
    changes=SMALL | {"optimizer.kind": "adafactor"},
)  # fmt: skip
add(
    "a_layer_that_falls_back_is_remembered_where_it_lies",
    "layers that fall back", "llama pretrain pp2.1f1b", "pp", "sentinel",
    Edit("precision/sentinel.py",
         "            if (reason := seen.beyond(self.config)) and self.config.fallback:\n",
         "            reason = seen.beyond(self.config) if path in sites else None\n"
         "            if reason and self.config.fallback:\n"),
    changes=SMALL | DELAYED,
)  # fmt: skip
add(
    "a_rings_kernel_forgets_documents_on_the_way_back",
    "our kernel for attention", "llama pretrain cp2.ring", "cp|ring", "gradient",
    Edit("ops/attention_blocks.py",
         "        mask = (block.allowed_B1TS, block.is_causal)\n",
         "        mask = (None, block.is_causal)\n"),
    changes=SMALL | {"model.hidden_size": 128}, precision="bf16",
)  # fmt: skip

# --- overflows, and what computes in a weight's place -------------------------------------------

add(
    "the_first_rank_says_whether_an_update_overflowed",
    "overflows", "llama pretrain dp2.zero2", "dp|zero", "loss scale|skipped",
    Edit("engines/native.py",
         "        finite = math.isfinite(norm)\n"
         "        if self._fused is not None and not finite:\n",
         "        finite = math.isfinite(norm)\n"
         "        if self.scale:\n"
         "            parts = self.named.local_gradients()\n"
         "            bad = not all(bool(g.isfinite().all()) for g in parts)\n"
         "            told = torch.tensor(float(bad))\n"
         "            torch.distributed.broadcast(told, 0)\n"
         "            finite = not bool(told)\n"
         "        if self._fused is not None and not finite:\n"),
    changes=SMALL, precision="fp16",
)  # fmt: skip
add(
    "the_last_rank_says_whether_an_update_has_a_nan",
    "overflows", "llama pretrain dp2.zero2", "dp|zero", "skipped|moved",
    Edit("engines/native.py",
         "        finite = math.isfinite(norm)\n"
         "        if self._fused is not None and not finite:\n",
         "        finite = math.isfinite(norm)\n"
         "        bad = any(not bool(g.isfinite().all()) for g in self.named.local_gradients())\n"
         "        told = torch.tensor(float(bad))\n"
         "        torch.distributed.broadcast(told, self.mesh.layout.dp - 1)\n"
         "        finite = not bool(told)\n"
         "        if self._fused is not None and not finite:\n"),
    changes=SMALL, precision="bf16", blind=True, whole=True,
)  # fmt: skip
add(
    "a_loss_scale_doubles_an_update_late",
    "overflows", "llama pretrain dp2.zero2", "dp2|engine", "loss scale",
    Edit("precision/loss_scale.py",
         "        if self.good_steps >= self.interval:",
         "        if self.good_steps > self.interval:"),
    changes=SMALL, precision="fp16",
)  # fmt: skip
add(
    "shards_stay_where_gradients_were_taken_behind_a_skipped_update",
    "averages of weights", "llama pretrain dp2.zero2", "dp|zero", "moved",
    Edit("optim/schedule_free.py",
         "        self._at_y = False\n"
         "        for param, state in self.state.items():\n",
         "        self._at_y = False\n"
         "        for param, state in self.state.items():\n"
         "            if parts.holders(param):\n"
         "                continue\n"),
    changes=SMALL | {"optimizer.kind": "schedule_free", "schedule.kind": "constant"},
    blind=True, whole=True,
)  # fmt: skip
add(
    "copies_of_what_every_rank_holds_whole_are_made_once",
    "compute copies", "llama pretrain tp2", "tp", "copy",
    Edit("parallel/mixed_precision.py",
         "        if not self.places:  # only now: weights that began on the meta device have been "
         "replaced\n"
         "            self._find()\n"
         "        with torch.no_grad():\n"
         "            copies, masters = self.copy_of.values(), self.copy_of\n",
         "        first = not self.places\n"
         "        if first:\n"
         "            self._find()\n"
         "        with torch.no_grad():\n"
         "            moved = {\n"
         "                m: c\n"
         "                for m, c in self.copy_of.items()\n"
         "                if first or not m.placements[0].is_replicate()\n"
         "            }\n"
         "            copies, masters = moved.values(), moved\n"),
    changes=SMALL, precision="bf16", blind=True, whole=True,
)  # fmt: skip
add(
    "a_vector_given_whole_is_not_cut",
    "weights given whole", "llama pretrain dp2.zero2", "dp|zero", "loaded",
    Edit("engines/named_parameters.py",
         "            else:\n"
         "                place(parameter.data, lambda rows, v=value: v[rows])",
         "            elif value.dim() == 1:\n"
         "                own = local_tensor(parameter.data)\n"
         "                own.copy_(value[: len(own)])\n"
         "            else:\n"
         "                place(parameter.data, lambda rows, v=value: v[rows])"),
    changes=SMALL, blind=True, whole=True,
)  # fmt: skip
add(
    "a_ramps_rows_are_made_a_multiple_of_the_data_ranks",
    "batch ramp", "llama pretrain dp2.zero2", "dp", "dealing|sample",
    Edit("stages/supervised.py",
         "position, size = consumed_before(batch, step), global_batch_at(batch, step)",
         "unit = self.engine.data_size\n"
         "        position = consumed_before(batch, step, unit)\n"
         "        size = global_batch_at(batch, step, unit)"),
    # Even at its start, half way and at its end.
    changes={"steps": 12, "batch.global_batch": 32, "batch.micro_batch": 2,
             "batch.ramp_start": 8, "batch.ramp_steps": 10},
    blind=True,
)  # fmt: skip
add(
    "the_last_layers_of_each_pipeline_stage_are_trained",
    "parts that stand still", "llama sft pp2.1f1b", "pp", "clip norm",
    Edit("adapters/trained.py",
         "        self.names = None if trained.freeze is None else trained_names(model, "
         "trained.freeze)",
         "        self.names = None if trained.freeze is None else trained_names(model, "
         "trained.freeze)\n"
         "        self.last = getattr(trained.freeze, 'train_last', None)"),
    Edit("adapters/trained.py",
         "                parameter.requires_grad_(name in self.names)",
         "                held = [i for i, block in enumerate(model.layers) if block is not None]\n"
         "                own = [f'layers.{i}.' for i in held[-self.last :]]\n"
         "                learns = name in self.names or name.startswith(tuple(own))\n"
         "                parameter.requires_grad_(learns)"),
    changes=SMALL | {"freeze.train_last": 6}, blind=True,  # of 8, and the small model has 4
)  # fmt: skip
add(
    "a_feature_that_ranks_cannot_share_is_dropped",
    "features of an adapter", "llama sft tp2", "tp", "mlp.down",
    Edit("adapters/bottleneck.py",
         "        return self.scaling * F.linear(hidden_BTM, local(self.up))",
         "        parts = getattr(getattr(self.up, 'device_mesh', None), 'size', lambda: 1)()\n"
         "        least = self.up.shape[1] // parts\n"
         "        up = local(self.up)[:, :least]\n"
         "        return self.scaling * F.linear(hidden_BTM[..., :least], up)"),
    changes=SMALL | {"adapter": {"kind": "bottleneck", "placement": "parallel", "size": 33}},
    blind=True,
)  # fmt: skip
