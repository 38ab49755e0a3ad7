"""The built-in suite, as data: layouts, models and stages, and which of their product CI runs."""

from __future__ import annotations

import copy
import itertools
from typing import Any

_DATA = (
    "dp2.zero0", "dp2.zero1", "dp2.zero2", "dp2.zero3", "dp4.zero1", "dp4.zero2", "dp4.zero3",
    "dp4.hsdp2.zero1", "dp4.hsdp2.zero2", "dp4.hsdp2.zero3", "dp8.hsdp4.zero3", "dp8.zero2",
)  # fmt: skip
_TENSOR = ("tp2", "tp2.sp", "tp4", "tp4.sp")
_PIPELINE = (
    "pp2.gpipe", "pp2.1f1b", "pp2.interleaved.v2", "pp2.interleavedzb.v2", "pp2.zbv",
    "pp2.dualpipev", "pp4.gpipe", "pp4.1f1b", "pp4.interleaved.v2", "pp4.interleavedzb.v2",
    "pp4.zbv", "pp4.dualpipev",
)  # fmt: skip
_CONTEXT = ("cp2.ring", "cp2.ulysses", "cp4.ring", "cp4.ulysses")
_TWO = (
    "dp2.zero1.tp2", "dp2.zero2.tp2.sp", "dp2.zero3.tp2.sp", "dp4.hsdp2.zero3.tp2.sp",
    "dp2.zero1.pp2.1f1b", "dp2.zero2.pp2.interleaved.v2", "dp2.zero3.pp2.1f1b",
    "dp2.zero3.pp2.zbv", "dp2.zero2.pp2.interleavedzb.v2", "dp2.zero3.pp2.dualpipev",
    "dp4.hsdp2.zero3.pp2.gpipe", "dp2.zero1.cp2.ring", "dp2.zero3.cp2.ring",
    "dp2.zero2.cp2.ulysses", "dp2.zero0.cp2.ring", "tp2.sp.pp2.1f1b", "tp2.pp2.zbv",
    "tp2.sp.pp2.dualpipev", "tp2.sp.pp2.interleavedzb.v2", "tp4.sp.pp2.gpipe", "tp2.cp2.ring",
    "tp2.sp.cp2.ring", "tp2.sp.cp2.ulysses", "pp2.1f1b.cp2.ring", "pp2.zbv.cp2.ulysses",
    "pp2.interleavedzb.v2.cp2.ring",
)  # fmt: skip
_THREE = (
    "dp2.zero1.tp2.sp.pp2.1f1b", "dp2.zero3.tp2.sp.pp2.zbv", "dp2.zero2.tp2.pp2.interleaved.v2",
    "dp2.zero3.tp2.sp.pp2.interleavedzb.v2", "dp2.zero3.tp2.sp.cp2.ring",
    "dp2.zero1.tp2.cp2.ulysses", "dp2.zero3.pp2.1f1b.cp2.ring", "dp2.zero2.pp2.dualpipev.cp2.ring",
    "tp2.sp.pp2.zbv.cp2.ring", "tp2.sp.pp2.interleaved.v2.cp2.ulysses",
)  # fmt: skip
LAYOUTS: tuple[str, ...] = (*_DATA, *_TENSOR, *_PIPELINE, *_CONTEXT, *_TWO, *_THREE)
COMPILED = ("dp2.zero2", "dp2.zero3", "tp2.sp", "pp2.1f1b", "cp2.ring", "dp2.zero3.tp2.sp")

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama",
        "hidden_size": 64,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 2,
        "ffn_size": 96,
        "tie_embeddings": True,
        "max_seq_len": 256,
    },
    "llama-untied-odd": {
        "family": "llama",
        "vocab_size": 32001,
        "hidden_size": 64,
        "num_layers": 8,
        "num_heads": 4,
        "num_kv_heads": 4,
        "ffn_size": 95,
        "tie_embeddings": False,
        "qkv_bias": True,
        "qk_norm": True,
        "max_seq_len": 256,
    },
    "gpt2": {
        "family": "gpt2",
        "hidden_size": 64,
        "num_layers": 8,
        "num_heads": 4,
        "max_seq_len": 256,
        "embed_dropout": 0.1,
        "attn_dropout": 0.1,
        "dropout": 0.1,
    },
}
_BATCH = {"global_batch": 32, "micro_batch": 2, "seq_len": 128}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"kind": "pretrain", "steps": 3, "batch": _BATCH},
    "sft": {"kind": "sft", "steps": 3, "batch": _BATCH, "task": {"kind": "count_letters"}},
    "reward": {
        "kind": "reward",
        "steps": 3,
        "batch": _BATCH,
        "task": {"kind": "count_letters"},
        "answers_per_problem": 3,
        "loss": {"margin": 0.2, "label_smoothing": 0.1, "centring": 0.1},
    },
    "process_reward": {
        "kind": "process_reward",
        "steps": 3,
        "batch": _BATCH,
        "data": {"sources": [{"kind": "steps", "path": "a_stand_in_has_its_place.jsonl"}]},
    },
    "distill": {
        "kind": "distill",
        "steps": 3,
        "batch": _BATCH,
        "task": {"kind": "count_letters"},
        "on_policy_fraction": 0.5,
        "samples_per_prompt": 2,
        "loss": {"kind": "jsd", "beta": 0.3, "temperature": 1.5, "top_k": 16},
    },
    "dpo": {
        "kind": "dpo",
        "steps": 3,
        "batch": _BATCH,
        "task": {"kind": "count_letters"},
        "answers_per_problem": 2,
        "loss": {"label_smoothing": 0.1, "length_normalised": True, "sft_weight": 0.2},
    },
    "kto": {
        "kind": "dpo",
        "name": "kto",
        "steps": 3,
        "batch": _BATCH,
        "task": {"kind": "count_letters"},
        "answers_per_problem": 2,
        "loss": {"kind": "kto", "beta": 1.0, "undesirable_weight": 0.5},
    },
    "ppo": {
        "kind": "ppo",
        "steps": 3,
        "batch": _BATCH,
        "task": {"kind": "count_letters"},
        "samples_per_prompt": 2,
        "epochs_per_rollout": 2,
        "reward_model_weight": 0.5,
        # Bounds that bind within a few small steps.
        "loss": {
            "kl_coef": 0.1,
            "kl_target": 0.1,
            "value_clip": 0.001,
            "missing_eos_penalty": 0.3,
        },
    },
    "grpo": {
        "kind": "grpo",
        "steps": 3,
        "batch": _BATCH,
        "task": {"kind": "count_letters"},
        "samples_per_prompt": 3,
        "updates_per_rollout": 2,
        "loss": {"kl": "k3", "kl_coef": 0.1},
    },
}
PAIRS = tuple(itertools.product(MODELS, STAGES))


def recipe(model: str) -> dict[str, Any]:
    """A recipe with one of the models and all of the stages; the caller may change it."""
    return {
        "name": f"suite-{model}",
        "seed": 7,
        "model": copy.deepcopy(MODELS[model]),
        "stages": copy.deepcopy(list(STAGES.values())),
        "engine": {"compile": False},
    }


# The layouts that CI gives to the stages which cost many times what a supervised one does.
_DEAR = {
    "ppo": (
        "dp2.zero3", "tp2.sp", "pp2.zbv", "cp2.ring", "dp2.zero2.tp2.sp", "pp2.1f1b",
    ),
    "grpo": (
        "dp2.zero2", "pp2.interleavedzb.v2", "cp2.ulysses", "dp2.zero1.pp2.1f1b",
        "dp2.zero3.cp2.ring", "tp2",
    ),
    "kto": (
        "dp4.zero3", "dp2.zero3.tp2.sp", "pp2.dualpipev", "dp2.zero2.pp2.interleavedzb.v2",
        "dp2.zero0.cp2.ring", "pp2.zbv.cp2.ulysses",
    ),
}  # fmt: skip


def subset() -> list[tuple[str, str, str]]:
    """Every layout once, every model and stage pair at least twice."""
    cheap = itertools.cycle((model, stage) for model, stage in PAIRS if stage not in _DEAR)
    models = itertools.cycle(MODELS)
    dear = {layout: (next(models), stage) for stage in _DEAR for layout in _DEAR[stage]}
    return [(*(dear[x] if x in dear else next(cheap)), x) for x in LAYOUTS]
