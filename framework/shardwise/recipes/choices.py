"""A stage's choices but for how it is laid out: lengths, batches, rates, what is measured."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

from shardwise.errors import UserError
from shardwise.recipes import rates, reward
from shardwise.recipes.facts import Facts
from shardwise.recipes.writing import Choice

SAVED = 12  # bytes of a trained weight in a checkpoint: itself and two moments in fp32
COPIES = 4  # that there may be at once: two, the best, and the one that is being written
LOOKS = 5  # at the validation data, and checkpoints, in a stage


def stage_choices(facts: Facts) -> list[Choice]:
    """In the order of a recipe; the micro-batch is 1 until `recipes.sizes` has found one."""
    usual = rates.USUAL[facts.asked.stage]
    usual = dataclasses.replace(usual, batch=max(1, round(usual.batch / facts.in_a_row)))
    epochs = facts.asked.epochs or usual.epochs
    batch, batch_why = rates.global_batch(usual, facts.rows, epochs, facts.machine.ranks)
    steps = max(1, math.ceil(facts.rows * epochs / batch))
    every = max(1, steps // LOOKS)
    adapts = facts.asked.adapter is not None
    rate, rate_why = rates.rate(usual, facts.start.config.hidden_size, adapts)
    found = [
        _at("kind", facts.asked.stage),
        _at("steps", steps, why=_epochs(facts, epochs, batch, usual.source)),
        _at("batch", "global_batch", batch, why=batch_why),
        _at("batch", "micro_batch", 1),
        _at("batch", "seq_len", facts.seq_len, why=_held(facts)),
        _at("optimizer", "lr", rate, why=rate_why),
        _at("optimizer", "weight_decay", usual.weight_decay),
        _at("schedule", "kind", usual.schedule, why=usual.source),
    ]
    if usual.warmup:
        found.append(_at("schedule", "warmup_steps", math.ceil(usual.warmup * steps)))
    if usual.min_ratio:
        found.append(_at("schedule", "min_ratio", usual.min_ratio))
    found += _problems(facts) if facts.asked.stage == "grpo" else _data(facts)
    if facts.asked.stage == "dpo":
        kind = "kto" if facts.data.unpaired else "sigmoid"
        found += [_at("loss", "kind", kind), _at("loss", "beta", 0.1, why=rates.BETA_WHY)]
    if adapts:
        found.append(_at("adapter", "kind", "lora", why=rates.ADAPTER_WHY))
        found += [_at("adapter", "rank", 16), _at("adapter", "alpha", 32)]
    if facts.asked.adapter == "qlora":
        found.append(_at("adapter", "quantise", "nf4", why=rates.QUANTISED_WHY))
    if facts.measures and facts.asked.stage != "grpo":
        found.append(_at("validation", "every", every, why=f"{LOOKS} times in the stage"))
    return [*found, *_checkpoints(facts, every)]


def _checkpoints(facts: Facts, every: int) -> list[Choice]:
    """When to save: at the end alone where the disk has no room for more.

    Raises UserError where it has none for one.
    """
    size = 0 if facts.asked.adapter else SAVED * facts.start.config.num_parameters()
    free = shutil.disk_usage(Path.cwd()).free if facts.machine.here else 2**62
    if size > free:
        raise UserError(
            f"{Path.cwd()}: a checkpoint takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} are free; "
            "free some, start from a folder on another disk, or train an adapter (--adapter lora)"
        )
    each = f"{size / 1e9:.1f} GB each" if size > 1e9 else "small"
    if COPIES * size > free:
        why = f"at the end alone, {each}; {free / 1e9:.1f} are free"
        return [_at("checkpoint", "keep", 1, why=why), _at("checkpoint", "keep_best", False)]
    kept = "the two newest and the best are kept" if facts.measures else "the two newest are kept"
    return [_at("checkpoint", "every", every, why=f"{LOOKS} times, {each}; {kept}")]


def _at(*said: Any, why: str = "") -> Choice:
    return Choice(("stages", 0, *said[:-1]), said[-1], why)


def _epochs(facts: Facts, epochs: float, batch: int, source: str) -> str:
    about = "" if facts.whole else "about "
    packed = "problems" if facts.asked.stage == "grpo" else "packed " * facts.packs + "rows"
    said = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    why = "as asked" if facts.asked.epochs else source
    return f"{said} of {about}{facts.rows:,} {packed}, {batch} a step ({why})"


def _held(facts: Facts) -> str:
    """What a row length holds of the data."""
    lengths, n = facts.lengths, facts.seq_len
    if facts.asked.stage == "pretrain":
        return (
            f"documents are packed into rows; half of {lengths.looked} have at most "
            f"{lengths.at(0.5):,} tokens, the longest {lengths.longest:,}"
        )
    text = (
        f"95 % of {lengths.looked} have at most {lengths.at(0.95):,} tokens, the longest "
        f"{lengths.longest:,}"
    )
    if facts.asked.stage == "grpo":
        return f"prompts have at most {lengths.longest:,} tokens, a completion {facts.new_tokens:,}"
    if out := int((lengths.own > n).sum()):
        number = f"{out:,} row{'s' * (out > 1)}" if facts.whole else f"{1 - lengths.share(n):.1%}"
        text += f" ({number} dropped)"
    if facts.asked.seq_len is None and n == facts.start.config.max_seq_len:
        text += "; the model reads no more"
    return text


def task_of(facts: Facts) -> dict[str, Any]:
    """The problems to learn from and those held out, as stage and evaluation name them."""
    apart = facts.validation.ref if facts.validation else facts.held_out
    return facts.data.task(apart)


def _problems(facts: Facts) -> list[Choice]:
    why, said = f"{facts.data.words}; ", facts.asked.reward
    why += "held_out: others" if facts.validation else f"held_out: {facts.held_out:.0%} of them"
    return [
        _at("task", task_of(facts), why=why if facts.measures else facts.data.words),
        _at("samples_per_prompt", rates.SAMPLES, why=rates.SAMPLES_WHY),
        _at("sampling", "temperature", 1.0),
        _at("sampling", "max_new_tokens", facts.new_tokens, why=rates.NEW_TOKENS_WHY),
        _at("reward", "parts", reward.parts(said), why=reward.why(said)),
    ]


def _data(facts: Facts) -> list[Choice]:
    found = [_at("data", "sources", [facts.data.section], why=facts.data.words)]
    if facts.validation:
        said = facts.validation
        found.append(_at("data", "validation", [said.section], why=said.words))
    elif facts.held_out:
        why = "of the data, by a hash of what is asked, to measure on"
        if facts.asked.stage == "pretrain":
            why = "of the documents, by a hash of each, to measure on"
        found.append(_at("data", "held_out", facts.held_out, why=why))
    if facts.asked.stage != "pretrain" and facts.drops:
        found.append(_at("data", "too_long", "drop", why="rows over seq_len are left out, counted"))
    return found
