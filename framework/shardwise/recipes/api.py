"""`shardwise init`: a recipe for a model and data, checked, with a reason for each choice."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.config import yaml12
from shardwise.config.load import LoadedConfig, load_config
from shardwise.config.run import RunConfig
from shardwise.errors import UserError
from shardwise.recipes import duration
from shardwise.recipes import reward as verifier
from shardwise.recipes.choices import stage_choices, task_of
from shardwise.recipes.data import READS, as_task, look
from shardwise.recipes.facts import Asked, Facts
from shardwise.recipes.machine import GIB, Machine, find_machine
from shardwise.recipes.model import open_start
from shardwise.recipes.sizes import Size, choose, least
from shardwise.recipes.writing import Choice, as_tree, as_yaml
from shardwise.stages.run import check_stage, preflight

ADAPTERS = ("lora", "qlora")


@dataclasses.dataclass(frozen=True)
class Written:
    """A recipe that was written: where, what starts it, and every choice with its reason.

    ``seconds`` is an estimate, None where there is none; ``takes`` says it, and what it assumes.
    """

    path: Path
    train: str
    machine: str
    gib_a_rank: float
    seconds: float | None
    takes: str
    choices: list[Choice]

    def lines(self) -> list[str]:
        """For a terminal: one a choice, then what to do next."""
        said = [choice.line for choice in self.choices if choice.why]
        last = f"written: {self.path}; start it: {self.train}"
        return [f"for {self.machine}", *said, self.takes, last]


def init(
    model: str | Path,
    data: str | Path,
    *,
    stage: str,
    adapter: str | None = None,
    ranks: int | None = None,
    gpu_memory: float | None = None,
    held_out: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    seq_len: int | None = None,
    epochs: float | None = None,
    reward: str | None = None,
    out: str | Path = "recipe.yaml",
    force: bool = False,
) -> Written:
    """Write a recipe that trains ``model`` on ``data``, and check it.

    ``model``: a Hugging Face folder, a checkpoint, a GGUF file or ``hf:org/name``. ``data``: a
    file, folder, glob or ``hf:org/name``; its format is told from its rows. ``stage``: pretrain,
    sft, dpo, reward or grpo; ``adapter``: lora or qlora. Sizes are for ``ranks`` processes on this
    machine (default: one for each GPU, or one), or for GPUs of ``gpu_memory`` GiB on another.
    ``held_out``: data to measure on; default: a share of ``data``. ``columns``: our names of some
    columns to the data's own, where they differ. ``seq_len`` and ``epochs`` are
    chosen unless they are given. ``reward``: of grpo, a verifier by name (default: answer), or a
    function of one's own as ``path.py:name``.

    Nothing is written unless the recipe loads, its layout and its memory fit and a sample of the
    data was read and tokenised. Raises UserError (exit code 2) that names what does not fit and
    the mend, and for an ``out`` that exists, without ``force``.
    """
    asked = _asked(stage, adapter, held_out, seq_len, epochs, reward)
    target = _target(Path(out), force)
    machine = find_machine(ranks, gpu_memory)
    start = open_start(str(model))
    found = look(str(data), stage, columns)
    apart = None if asked.held_out is None else look(asked.held_out, stage, columns)
    lengths = found.lengths(stage, start.tokenizer)
    measured = None if apart is None else apart.lengths(stage, start.tokenizer)
    facts = Facts(asked, start, found, lengths, machine, apart, measured)
    _check_lengths(facts)
    choices, size = _sized(facts, target)
    seconds = duration.seconds_of(_load(choices, facts), facts)
    takes = duration.words(seconds, facts)
    text = as_yaml(choices, _head(facts, target, takes))
    _check(load_config(yaml12.parse(text, f"{target}").data), machine)
    _write(target, text)
    gib, train = size.bytes_a_rank / GIB, _train(target, machine)
    return Written(target, train, machine.words, gib, seconds, takes, choices)


def _asked(
    stage: str,
    adapter: str | None,
    held_out: Any,
    seq_len: int | None,
    epochs: float | None,
    reward: str | None,
) -> Asked:
    if stage not in READS:
        raise UserError(f"--stage {stage}: known: {', '.join(READS)}")
    if adapter is not None and adapter not in ADAPTERS:
        raise UserError(f"--adapter {adapter}: known: {', '.join(ADAPTERS)}")
    if seq_len is not None and seq_len < 1:
        raise UserError(f"--seq-len {seq_len}: at least 1")
    if epochs is not None and epochs <= 0:
        raise UserError(f"--epochs {epochs:g}: more than 0")
    if reward is not None and stage != "grpo":
        raise UserError(f"--reward {reward}: of --stage grpo alone; {stage} learns from its rows")
    verifier.parts(reward)
    apart = None if held_out is None else str(held_out)
    return Asked(stage, adapter, apart, seq_len, epochs, reward)


def _check_lengths(facts: Facts) -> None:
    """Raise UserError where no row fits, or the model reads no such rows."""
    if facts.asked.stage == "grpo":
        task = as_task(task_of(facts))
        verifier.check(facts.asked.reward, task)
        if facts.validation:
            any(task.problems("held_out"))  # says which prompts are in both
    most, said = facts.start.config.max_seq_len, facts.asked.seq_len
    if said is not None and said > most:
        raise UserError(f"--seq-len {said}: the model reads {most} tokens at most")
    shortest = int(facts.lengths.own.min()) + (facts.asked.stage == "grpo")
    longest = most if said is None else said
    if facts.asked.stage != "pretrain" and shortest > longest:
        raise UserError(
            f"{facts.data.ref}: no row has fewer than {shortest} tokens, and "
            + (f"the model reads {most} at most" if said is None else f"--seq-len is {said}")
        )


def _target(out: Path, force: bool) -> Path:
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: a recipe's name ends in .yaml")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if out.is_dir() or (out.exists() and not force):
        raise UserError(f"--out {out}: is there already; give another name, or --force")
    return out


def _sized(facts: Facts, target: Path) -> tuple[list[Choice], Size]:
    """All choices, and how the stage is computed. Raises UserError if it fits in no way."""
    draft = _choices(facts, target, Size("auto", "none", 1, facts.machine.ranks, 0))
    run = _load(draft, facts)
    size = choose(run, facts.machine, facts.row)
    if size is None:
        raise UserError(_too_large(facts, target, run))
    return _choices(facts, target, size), size


def _load(choices: list[Choice], facts: Facts) -> RunConfig:
    run = load_config(as_tree(choices)).config
    return run.model_copy(update={"model": facts.start.config})


def _choices(facts: Facts, target: Path, size: Size) -> list[Choice]:
    machine = facts.machine
    share = f"takes {size.gib} of the {machine.bytes_a_rank / GIB:.1f} GiB that a rank has"
    where = "here" if machine.here else "there"
    engine = [
        Choice(("engine", "precision"), "auto", f"{machine.precision} {where}"),
        Choice(("engine", "layout"), size.layout, _layout_why(size, machine)),
    ]
    if size.recompute != "none":
        why = "activations are computed again in the backward pass; kept, they would not fit"
        engine.append(Choice(("engine", "recompute"), size.recompute, why))
    micro = ("stages", 0, "batch", "micro_batch")
    stage = [
        dataclasses.replace(c, value=size.micro_batch, why=share) if c.keys == micro else c
        for c in stage_choices(facts)
    ]
    return [
        Choice(("name",), _name(target), ""),
        Choice(("init_from",), facts.start.ref, facts.start.words),
        *engine,
        *stage,
        *_measured(facts),
    ]


def _measured(facts: Facts) -> list[Choice]:
    """Evaluations, with what the model is worth before."""
    kind = {"pretrain": "bits_per_byte", "grpo": "problems"}.get(facts.asked.stage)
    if kind is None or not facts.measures:
        return []
    evaluation: dict[str, Any] = {"kind": kind, "seq_len": facts.seq_len}
    why = "of the data held out, before and after; figures of any tokenizer can be compared"
    if kind == "problems":
        why = "right answers to the problems held out, before and after"
        evaluation = {
            "kind": kind,
            "task": task_of(facts),
            "max_new_tokens": facts.new_tokens,
            "reward": {"parts": verifier.parts(facts.asked.reward)},
        }
    return [
        Choice(("evaluate_start",), True, ""),
        Choice(("evaluations",), [evaluation], why),
    ]


def _layout_why(size: Size, machine: Machine) -> str:
    if machine.ranks == 1:
        return "one rank"
    if size.layout == "auto":
        return f"all {machine.ranks} ranks share the data (ZeRO-1)"
    shards = {
        "zero2": "gradients, too, are divided among the data ranks",
        "zero3": "weights, too, are divided among the data ranks",
    }
    shares = {
        "tp": "{} ranks share every layer",
        "cp": "{} ranks share every row",
        "pp": "{} ranks have some layers each",
    }
    parts = size.layout.split(".")
    said = [shares[p[:2]].format(p[2:]) for p in parts if p[:2] in shares]
    said += [shards[p] for p in parts if p in shards]
    return f"{' and '.join(said)}, or it would not fit"


def _too_large(facts: Facts, target: Path, run: RunConfig) -> str:
    """What would fit, with figures."""
    machine = facts.machine
    needs = least(run, machine, facts.row) / GIB
    have = machine.budget / GIB
    offers = []

    def offer(words: str, **changes: Any) -> bool:
        other = dataclasses.replace(facts, **changes)
        draft = _choices(other, target, Size("auto", "none", 1, other.machine.ranks, 0))
        size = choose(_load(draft, other), other.machine, other.row)
        if size is not None:
            offers.append(f"{words} ({size.gib})")
        return size is not None

    order = (None, *ADAPTERS)
    for adapter in order[order.index(facts.asked.adapter) + 1 :]:
        if offer(f"--adapter {adapter}", asked=dataclasses.replace(facts.asked, adapter=adapter)):
            break
    ranks = machine.ranks
    while ranks < 1024:
        ranks *= 2
        words = f"--ranks {ranks} of the same memory each"
        if offer(words, machine=machine.with_ranks(ranks)):
            break
    length = facts.seq_len
    while length > 64:
        length //= 2
        words = f"--seq-len {length}"
        if offer(words, asked=dataclasses.replace(facts.asked, seq_len=length)):
            break
    mend = "; what would: " + ", or ".join(offers) if offers else "; no adapter or length would"
    return (
        f"{facts.start.ref}: {facts.start.config.num_parameters():,} parameters do not fit: stage "
        f"{facts.asked.stage} needs {needs:.1f} GiB a rank at least, and {have:.1f} of "
        f"{machine.bytes_a_rank / GIB:.1f} can be filled ({machine.words}){mend}"
    )


def _name(target: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", target.stem).lstrip(".-")[:100] or "recipe"


def _train(target: Path, machine: Machine) -> str:
    ranks = f" --nproc {machine.ranks}" if machine.ranks > 1 else ""
    return f"shardwise train {shlex.quote(str(target))}{ranks}"


def _head(facts: Facts, target: Path, takes: str) -> str:
    adapter = {None: "", "lora": " with LoRA", "qlora": " with QLoRA"}[facts.asked.adapter]
    names = (Path(ref).name for ref in (facts.start.ref, facts.data.ref))
    return (
        f"{' learns from '.join(names)}: {facts.asked.stage}{adapter}.\n"
        f"Written by shardwise init for {facts.machine.words}.\n"
        f"{takes.capitalize()}.\nWhat starts it:\n"
        f"{_train(target, facts.machine)}"
    )


def _check(loaded: LoadedConfig, machine: Machine) -> None:
    """As `shardwise train` will, before anything is started."""
    if machine.here:
        preflight(loaded.config, machine.ranks, loaded.provenance)
        return
    for stage in loaded.config.training:
        check_stage(loaded.config, stage, machine.ranks)


def _write(target: Path, text: str) -> None:
    fresh = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
