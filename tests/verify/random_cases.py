"""Recipes and layouts drawn at random: whatever may be asked of verify, and is computed rightly.

A case is a function of its number alone, so that one that was flagged is run again by it.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from shardwise.config.load import load_config
from shardwise.errors import UserError
from shardwise.parallel.layout import CP_KINDS, SCHEDULES, SINGLE, V_SHAPED, Layout
from shardwise.stages.run import check_stage
from shardwise.verify import suite
from shardwise.verify.roles import layouts_of, with_layouts, world_of
from shardwise.verify.shrink import sizes
from tests.support.families import SMALL, small

PRECISIONS = ("fp64", "fp32", "bf16", "fp16")
# Stages with roles cost many times what the others do.
STAGES = ("pretrain", "sft", "reward", "grpo", "pretrain", "sft", "reward", "ppo")
# Most worlds are small: what an axis does, it does on two ranks or three; several axes need more.
WORLDS = (2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 6, 8)
AXES = ("dp", "tp", "pp", "cp")


@dataclasses.dataclass(frozen=True)
class Case:
    """``whole``: saved, resumed and served, too, and one process compared with itself."""

    recipe: dict[str, Any]
    stage: str
    layout: str
    precision: str
    whole: bool

    def __str__(self) -> str:
        family = self.recipe["model"]["family"]
        how = "whole" if self.whole else "updates"
        return f"{family} {self.stage} {self.layout} {self.precision} {how}"


def draw(index: int) -> Case:
    """The case of a number; a recipe that its layout cannot have is drawn anew."""
    rng = random.Random(index)
    stage = STAGES[index % len(STAGES)]
    precision = PRECISIONS[index // len(STAGES) % len(PRECISIONS)]
    fp8 = precision in ("fp64", "bf16") and rng.random() < 0.08
    # 8-bit products in bf16 scatter so far that a policy's clip has tokens on both sides of it.
    fp8 = fp8 and (precision == "fp64" or stage not in ("ppo", "grpo"))
    while True:
        layout = _layouts(rng, stage)
        for _ in range(50):
            recipe = _recipe(rng, stage, precision, fp8)
            if possible(recipe, stage, layout):
                return Case(recipe, stage, layout, precision, rng.random() < 0.2)


def possible(recipe: dict[str, Any], stage: str, layout: str) -> bool:
    """Whether a stage's model and batch can have a layout, as they are and made small."""
    try:
        run = load_config(recipe).config
        changed = with_layouts(run.stages[0], layout, compile=False)
        check_stage(run, changed, world_of(layout))
        sizes(run, run.stages[0], layouts_of(layout))
    except UserError:
        return False
    return True


# --- the layout ---------------------------------------------------------------------------------


def _layout(rng: random.Random, world: int) -> Layout:
    """A layout of ``world`` ranks: each of its prime factors goes to an axis."""
    ranks = dict.fromkeys(AXES, 1)
    for prime in (2, 2, 2, 3):
        if world % prime == 0:
            world //= prime
            ranks[rng.choice(AXES)] *= prime
    dp, pp = ranks["dp"], ranks["pp"]
    zero = rng.randrange(4)
    shard = rng.choice([d for d in range(1, dp + 1) if dp % d == 0] + [dp, dp]) if zero else 1
    schedule = rng.choice(SCHEDULES) if pp > 1 else "1f1b"
    virtual = 1 if schedule in SINGLE else 2 if schedule in V_SHAPED else rng.randint(2, 3)
    kind = rng.choice(CP_KINDS) if ranks["cp"] > 1 else "ring"
    sp = ranks["tp"] > 1 and rng.random() < 0.5
    return Layout(dp, shard, zero, ranks["tp"], sp, pp, virtual, schedule, ranks["cp"], kind)


def _layouts(rng: random.Random, stage: str) -> str:
    """One for all roles, rarely one a role, on all ranks or on some."""
    if stage != "ppo" or rng.random() < 0.6:
        return str(_layout(rng, rng.choice(WORLDS)))
    if rng.random() < 0.5:
        world = rng.choice((2, 2, 2, 4))
        return ",".join(f"{role}={_layout(rng, world)}" for role in ("actor", "critic"))
    first, second = rng.choice((1, 2)), rng.choice((1, 2))
    actor, critic = _layout(rng, first), _layout(rng, second)
    return f"actor={actor}@0-{first - 1},critic={critic}@{first}-{first + second - 1}"


# --- the recipe ---------------------------------------------------------------------------------


def _recipe(rng: random.Random, stage: str, precision: str, fp8: bool) -> dict[str, Any]:
    """A recipe of one stage."""
    model = _quantised(rng) if fp8 else rng.choice((_llama, _other, _gpt2, _other))(rng)
    engine: dict[str, Any] = {
        "compile": False,
        "recompute": rng.choice(("none", "none", "selective", "full")),
        "max_grad_norm": rng.choice((0.0, 0.1, 1.0, 1.0)),
    }
    if fp8:
        kind = rng.choice(("delayed", "current", "mxfp8"))
        engine |= {"precision": "bf16", "fp8": {"recipe": kind, "amax_history_len": 2}}
    chosen = suite.STAGES[stage] | _of_stage(rng, stage, precision) | {"steps": 20}
    chosen |= {
        "optimizer": _optimizer(rng),
        "schedule": rng.choice(
            (
                {"kind": "cosine", "warmup_steps": rng.choice((0, 3))},
                {"kind": "linear", "min_ratio": 0.1},
                {"kind": "wsd", "warmup_steps": 2, "decay_steps": 5},
                {"kind": "constant"},
            )
        ),
        "validation": {"every": rng.choice((0, 2)), "max_batches": 2},
    }
    return {
        "name": "random",
        "seed": rng.randrange(100),
        "model": model,
        "engine": engine,
        "stages": [chosen],
    }


def _optimizer(rng: random.Random) -> dict[str, Any]:
    rare = rng.choice(("lion", "muon", "adafactor", "schedule_free"))
    kind = rng.choice(("adamw", "adamw", "adamw", "adam", "adam", "sgd", "sgd", rare))
    found: dict[str, Any] = {
        "kind": kind,
        "lr": rng.choice((1e-4, 1e-3)),
        "weight_decay": rng.choice((0.0, 0.1)),
    }
    if kind == "sgd":
        found |= {"momentum": rng.choice((0.0, 0.9))}
        found |= {"nesterov": found["momentum"] > 0 and rng.random() < 0.5}
    if rng.random() < 0.2:
        found["groups"] = [
            {"match": "*attn*", "lr_scale": rng.choice((0.0, 4.0))},
            {"match": "*embed*", "weight_decay": 0.2},
        ]
    return found


def _llama(rng: random.Random) -> dict[str, Any]:
    """Heads, widths, layers and words of any number, odd ones included."""
    kv = rng.choice((1, 1, 2, 2, 3, 4, 5))
    heads = kv * rng.choice((1, 2, 3))
    head_dim = rng.choice((8, 10, 16, 32, 64))
    own = rng.random() < 0.25  # as wide as it says, not as the model is
    model: dict[str, Any] = {
        "family": "llama",
        "vocab_size": rng.choice((0, 0, 512, 1000 + rng.randrange(500))),
        "hidden_size": heads * head_dim + (18 if own else 0),
        "head_dim": head_dim if own else None,
        "num_layers": rng.choice((1, 2, 2, 3, 3, 4, 5, 6)),
        "num_heads": heads,
        "num_kv_heads": kv,
        "ffn_size": rng.randrange(90, 200),
        "tie_embeddings": rng.random() < 0.5,
        "qkv_bias": rng.random() < 0.3,
        "o_bias": rng.random() < 0.2,
        "qk_norm": rng.random() < 0.3,
        "dropout": rng.choice((0.0, 0.0, 0.0, 0.1)),
        "max_seq_len": 1024,
    }
    if rng.random() < 0.25:
        start = rng.randrange(model["num_layers"])
        model |= {"sliding_window": rng.randrange(8, 100), "window_start_layer": start}
    if rng.random() < 0.15:
        scaling = {"kind": rng.choice(("linear", "yarn", "llama3")), "factor": 4.0}
        model["rope_scaling"] = scaling | {"original_max_seq_len": 256}
    return model


def _gpt2(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice((1, 2, 3, 4, 6, 8))
    return {
        "family": "gpt2",
        "vocab_size": rng.choice((0, 0, 512, 1000 + rng.randrange(500))),
        "hidden_size": heads * rng.choice((8, 11, 16, 32)),
        "num_layers": rng.choice((1, 2, 2, 3, 3, 4, 5, 6)),
        "num_heads": heads,
        "ffn_size": rng.choice((None, rng.randrange(90, 200))),
        "tie_embeddings": rng.random() < 0.5,
        "embed_dropout": rng.choice((0.0, 0.1)),
        "attn_dropout": rng.choice((0.0, 0.0, 0.1)),
        "dropout": rng.choice((0.0, 0.1)),
        "max_seq_len": 1024,
    }


def _other(rng: random.Random) -> dict[str, Any]:
    """A family that neither of those is, with all its switches on."""
    family = rng.choice([name for name in SMALL if name not in ("llama", "gpt2")])
    model = small(family, num_layers=rng.choice((2, 3, 4, 6)), max_seq_len=1024)
    model["vocab_size"] = rng.choice((0, 512, 1000 + rng.randrange(500)))
    if "sliding_window" in model:
        model["sliding_window"] = rng.randrange(8, 100)
    return model


def _quantised(rng: random.Random) -> dict[str, Any]:
    """Widths that 8-bit products can have, and layers between the first and the last."""
    return suite.MODELS["llama"] | {
        "num_layers": rng.choice((3, 4, 5)),
        "num_heads": 4,
        "num_kv_heads": rng.choice((2, 4)),
    }


def _of_stage(rng: random.Random, stage: str, precision: str) -> dict[str, Any]:
    """A batch that need not be shared evenly, and what a stage has of its own."""
    supervised = stage in ("pretrain", "sft", "reward")
    updates = 1 if supervised else rng.choice((1, 2))
    batch: dict[str, Any] = {
        "global_batch": rng.randint(1, 12 if supervised else 6) * updates,
        "micro_batch": rng.choice((1, 1, 2, 3, 4)),
        "seq_len": rng.randrange(200, 330),
    }
    if supervised and rng.random() < 0.1:
        batch |= {"ramp_start": rng.randint(1, batch["global_batch"]), "ramp_steps": 5}
    found: dict[str, Any] = {"batch": batch}
    if stage == "sft":
        found["data"] = {"pack": rng.random() < 0.5}
    if stage == "reward":
        found["answers_per_problem"] = rng.choice((2, 3, 4))
        found["loss"] = rng.choice(
            (
                {"margin": 0.2, "label_smoothing": 0.1, "centring": 0.1},
                {},
                {"objective": "plackett_luce"},
            )
        )
    if not supervised:
        found |= {"updates_per_rollout": updates, "epochs_per_rollout": rng.choice((1, 2))}
        found["samples_per_prompt"] = rng.choice((2, 3))
        found["loss"] = _ppo_loss(rng, precision) if stage == "ppo" else _grpo_loss(rng)
    if stage == "ppo":
        found["reward_model_weight"] = rng.choice((0.0, 0.5))
        found["critic_warmup_steps"] = rng.choice((0, 0, 1))
    return found


def _ppo_loss(rng: random.Random, precision: str) -> dict[str, Any]:
    # A clip as narrow as 16 bits are coarse has values on both sides of it, as rounding has it.
    narrow = 0.001 if precision in ("fp64", "fp32") else 0.1
    kl = rng.choice(({"kl_coef": 0.0}, {"kl_coef": 0.1}, {"kl_coef": 0.1, "kl_target": 0.1}))
    return kl | {
        "kl": rng.choice(("k1", "k2", "k3")),
        "objective": rng.choice(("clip", "clip", "kl_penalty")),
        "value_clip": rng.choice((None, narrow, 0.2)),
        "gamma": rng.choice((1.0, 0.9)),
        "whiten_advantages": rng.random() < 0.7,
        "whiten_rewards": rng.random() < 0.3,
        "missing_eos_penalty": rng.choice((0.0, 0.3)),
    }


def _grpo_loss(rng: random.Random) -> dict[str, Any]:
    kl = rng.choice(("none", "k1", "k2", "k3"))
    return {
        "kl": kl,
        "kl_coef": 0.0 if kl == "none" else 0.1,
        "advantage": rng.choice(("group_std", "group", "rloo", "reinforce_pp")),
        "ratio": rng.choice(("token", "token", "sequence", "cispo")),
        "aggregation": rng.choice(
            ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum")
        ),
        "importance_cap": rng.choice((None, None, 2.0)),
    }
