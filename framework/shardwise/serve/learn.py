"""`shardwise.learn`: what users fed back becomes an adapter, if a gate lets it.

What is learned, measured and decided follows from a plan that is on disk before anything else is
done, so the same command goes on after a kill and comes to the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import xxhash

from shardwise import safe_files
from shardwise.checkpoint import adapted
from shardwise.checkpoint.convert import convert, open_model
from shardwise.config.start import located
from shardwise.data.chat import encode_chat
from shardwise.data.files import hash_file
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import CheckpointError, DataError, UserError
from shardwise.launch.train import train
from shardwise.models.common.config import DecoderConfig
from shardwise.serve import feedback, gate, log, measure, versions
from shardwise.storage.durable import make_folder, write_durably
from shardwise.storage.lock import RunLock

PLAN, RUN, ADAPTER = "plan.json", "run", "adapter"
Method = Literal["sft", "dpo", "kto"]
METHODS: tuple[Method, ...] = ("sft", "dpo", "kto")
MIN_HELD_OUT = 8  # fed-back tasks that nothing is trained on; fewer say nothing


@dataclasses.dataclass(frozen=True)
class Training:
    """How an adapter (LoRA) is trained. ``methods``: stages, one after the other."""

    methods: tuple[Method, ...] = ("sft",)
    epochs: float = 4.0
    batch: int = 8
    lr: float = 1e-3
    rank: int = 16
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class _Plan:
    """``asked``: what the command said. The tasks are the log's at the time of planning."""

    version: str
    asked: dict[str, Any]
    parent: str | None
    learn: list[feedback.Task]
    held_out: list[feedback.Task]
    dropped: dict[str, int]


def learn(
    log_file: Path | str,
    ckpt: Path | str,
    out: Path | str,
    *,
    training: Training | None = None,
    rules: feedback.Filter | None = None,
    bounds: gate.Bounds | None = None,
    held_out: float = 0.25,
    probe_texts: Sequence[Path | str] = (),
) -> dict[str, Any]:
    """Learn a version of the adapter in ``out`` over ``ckpt`` from a server's log.

    It starts from the version that ``out/current.json`` names, or anew. If the gate lets it, the
    pointer moves, and servers that watch ``out`` serve it; else it is kept in ``out/refused``.
    Returns ``accepted``, ``reasons``, ``version``, ``folder`` and all figures; ``version`` None:
    the log holds nothing that is not learned yet.

    ``held_out``: share of the prompts that nothing is trained on. ``probe_texts``: for the
    forgetting probe, see `measure.evaluations_of`. Raises DataError for what is no log, UserError
    for a log with too little in it, LockedError while another one learns into ``out``.
    """
    out, training = Path(out), training or Training()
    rules, bounds = rules or feedback.Filter(), bounds or gate.Bounds()
    base = located(ckpt)
    texts = [Path(t) for t in probe_texts]
    asked = {
        "log": str(Path(log_file).absolute()),
        "base": adapted.weights_hash(base),
        "training": dataclasses.asdict(training),
        "rules": dataclasses.asdict(rules),
        "bounds": dataclasses.asdict(bounds),
        "held_out": held_out,
        "probe": [hash_file(t) for t in texts],
    }
    asked = json.loads(json.dumps(asked))
    if not log.parts(Path(log_file)):
        raise DataError(f"{log_file}: no such log")
    make_folder(out)
    with RunLock(out):
        plan = _read_plan(out, asked) or _new_plan(Path(log_file), base, out, asked)
        if plan is None:
            return {"accepted": True, "reasons": [], "version": None, "folder": None}
        return _carry_out(plan, base, out, training, bounds, texts)


def _read_plan(out: Path, asked: dict[str, Any]) -> _Plan | None:
    """The plan of a command that said the same and was killed."""
    try:
        said = safe_files.parse_json(safe_files.read_bytes(out / versions.WORK / PLAN))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{out / versions.WORK / PLAN}: damaged: {error}") from None
    if said["asked"] != asked:
        return None

    def tasks(rows: list[Any]) -> list[feedback.Task]:
        return [
            feedback.Task(
                tuple((r, c) for r, c in row["prompt"]), tuple(row["good"]), tuple(row["bad"])
            )
            for row in rows
        ]

    return _Plan(**said | {"learn": tasks(said["learn"]), "held_out": tasks(said["held_out"])})


def _new_plan(log_file: Path, base: Path, out: Path, asked: dict[str, Any]) -> _Plan | None:
    """What the log says now, on disk; None: nothing that is not learned yet."""
    records = (record for _, record in log.read(log_file))
    tasks, dropped = feedback.tasks_of(records, feedback.Filter(**asked["rules"]))
    opened = open_model(base)
    assert isinstance(opened.config, DecoderConfig)
    tokenizer, longest = measure.tokenizer_of(opened), opened.config.max_seq_len
    fit = [task for task in tasks if _fits(task, tokenizer, longest)]
    if len(fit) < len(tasks):
        dropped["longer than the model takes, or with control tokens"] = len(tasks) - len(fit)
    to_learn, held = feedback.split(fit, asked["held_out"])
    rows = feedback.rows_of(to_learn)
    said = f"{log_file}: {len(fit)} rated tasks can be used (dropped: {dropped or 'none'})"
    if empty := [m for m in asked["training"]["methods"] if not rows[m]]:
        raise UserError(f"{said}, none of them for {', '.join(empty)}; collect more feedback")
    if (known := sum(bool(task.good) for task in held)) < MIN_HELD_OUT:
        raise UserError(
            f"{said}; {known} held-out ones have a good answer, and the gate needs {MIN_HELD_OUT}: "
            "collect more feedback, or raise --held-out"
        )
    parent = versions.current(out)
    lineage = versions.read_lineage(versions.folder(out, parent)) if parent else {}
    if parent and lineage["base"] != asked["base"]:
        raise UserError(
            f"{out}: its adapter belongs to another base model (weights of hash "
            f"{lineage['base']}); give that one, or another --adapter"
        )
    if not {task.hash for task in to_learn} - set(lineage.get("learned", [])):
        return None
    made = {"parent": parent, "learn": to_learn, "held_out": held}
    plain = {k: [dataclasses.asdict(t) for t in v] if isinstance(v, list) else v
             for k, v in made.items()}  # fmt: skip
    named = {k: v for k, v in asked.items() if k != "log"}  # the content counts, not the place
    text = json.dumps([named, plain], sort_keys=True, ensure_ascii=False)
    version = xxhash.xxh3_128_hexdigest(text.encode())
    work = out / versions.WORK
    shutil.rmtree(work, ignore_errors=True)
    document = {"version": version, "asked": asked, "dropped": dropped, **plain}
    write_durably(work / PLAN, json.dumps(document, ensure_ascii=False).encode())
    return _Plan(version, asked, parent, to_learn, held, dropped)


def _fits(task: feedback.Task, tokenizer: Tokenizer, longest: int) -> bool:
    try:
        return all(_length(task, text, tokenizer) <= longest for text in (*task.good, *task.bad))
    except DataError:
        return False


def _length(task: feedback.Task, text: str, tokenizer: Tokenizer) -> int:
    """Tokens of a prompt with an answer to it. Raises DataError for control tokens in them."""
    return len(encode_chat(tokenizer, [*task.messages, {"role": "assistant", "content": text}])[0])


def _carry_out(
    plan: _Plan, base: Path, out: Path, training: Training, bounds: gate.Bounds, texts: list[Path]
) -> dict[str, Any]:
    """Train, measure, decide and commit, or what of it is left to do."""
    work = out / versions.WORK
    for accepted in (True, False):
        place = out / (versions.VERSIONS if accepted else versions.REFUSED) / plan.version
        if (place / versions.LINEAGE).exists():  # made before
            if accepted:
                versions.point(out, plan.version)
            shutil.rmtree(work, ignore_errors=True)
            return _result(place, versions.read_lineage(place))
    opened = open_model(base)
    tokenizer = measure.tokenizer_of(opened)
    made = work / ADAPTER
    if not (made / "adapter_config.json").exists():
        shutil.rmtree(made, ignore_errors=True)
        recipe = _recipe(plan, base, out, training, tokenizer)
        train(recipe)
        last = recipe["stages"][-1]["name"]
        convert(work / RUN / "stages" / last / "checkpoints", made, "peft")
    parent = versions.folder(out, plan.parent) if plan.parent else None
    longest = max(
        _length(task, text, tokenizer) for task in plan.held_out for text in (*task.good, *task.bad)
    )
    before, after = (
        measure.fed_back(base, adapter, plan.held_out, longest) for adapter in (parent, made)
    )
    assert isinstance(opened.config, DecoderConfig)
    seq_len = min(256, opened.config.max_seq_len)
    probed = [measure.probe(base, adapter, texts, seq_len) for adapter in (None, made)]
    moved = gate.forgetting(*probed)
    why = gate.reasons(before, after, moved, bounds)
    lineage = {
        "version": plan.version,
        "base": plan.asked["base"],
        "parent": plan.parent,
        "accepted": not why,
        "reasons": why,
        "rows": _hash_of(plan.learn),
        "learned": [task.hash for task in plan.learn],
        "held_out_rows": _hash_of(plan.held_out),
        "dropped": plan.dropped,
        "asked": plan.asked,
        "fed_back": {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)},
        "forgetting": moved,
        "probe": {"base": probed[0], "now": probed[1]},
    }
    place = versions.commit(out, made, lineage, accepted=not why)
    shutil.rmtree(work, ignore_errors=True)
    return _result(place, versions.read_lineage(place))


def _hash_of(tasks: Sequence[feedback.Task]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(task.hash for task in tasks).encode())


def _result(place: Path, lineage: dict[str, Any]) -> dict[str, Any]:
    keys = ("accepted", "reasons", "version", "fed_back", "forgetting", "dropped", "parent")
    return {**{key: lineage[key] for key in keys}, "folder": str(place)}


def _recipe(
    plan: _Plan, base: Path, out: Path, training: Training, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The recipe that trains the adapter; its data are written beside the plan."""
    work = out / versions.WORK
    rows = feedback.rows_of(plan.learn)
    parent = versions.folder(out, plan.parent) if plan.parent else None
    lengths = [
        _length(task, text, tokenizer) for task in plan.learn for text in (*task.good, *task.bad)
    ]
    stages: list[dict[str, Any]] = []
    for method in training.methods:
        data = work / f"{method}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[method])
        write_durably(data, text.encode())
        # A row of a pair holds both of its answers.
        seq_len = (max(lengths) + 1) * (2 if method == "dpo" else 1)
        batch = min(training.batch, max(2, len(rows[method])))
        kind = "prompt-completion" if method == "sft" else "preference"
        stage: dict[str, Any] = {
            "kind": "sft" if method == "sft" else "dpo",
            "name": method,
            "steps": max(1, round(training.epochs * len(rows[method]) / batch)),
            "batch": {"global_batch": batch, "micro_batch": batch, "seq_len": -(-seq_len // 8) * 8},
            "optimizer": {"lr": training.lr, "weight_decay": 0.0},
            "data": {"sources": [{"kind": kind, "path": str(data)}]},
            "adapter": {
                "kind": "lora",
                "rank": training.rank,
                "alpha": 2.0 * training.rank,
                "start": "parent" if stages or parent else "new",
            },
        }
        if method == "kto":
            stage["loss"] = {"kind": "kto"}
        elif method == "sft":
            stage["data"]["pack"] = False  # a step is so many answers
        stages.append(stage)
    return {
        "run_dir": str(work / RUN),
        "seed": training.seed,
        "init_from": str(parent or base),
        "engine": {"compile": False},
        "stages": stages,
    }
