"""What a stage's weights come from, and whether its checkpoints may go on under a recipe.

A hash settles it in one glance. Where it differs, the recipe that a checkpoint holds is read anew
and compared value by value: a key that came into the schema later, or got another name, has then
on both sides what it means today, and what really differs is named.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import xxhash

from shardwise import hub
from shardwise.checkpoint import manifest
from shardwise.checkpoint.convert import RUN_FILE
from shardwise.config.artifacts import artifacts_of
from shardwise.config.load import load_config
from shardwise.config.redact import redact_data
from shardwise.config.registry import DEFAULT_ENGINE
from shardwise.config.run import RunConfig
from shardwise.config.schema import EngineConfig, JobConfig, StageConfig
from shardwise.data.tokenizer import load_tokenizer
from shardwise.errors import CheckpointError, ExitCode, ShardwiseError
from shardwise.models import text_part
from shardwise.stages.initial_weights import initial_hash

# Keys of a stage that may change without making it another computation.
FREE_KEYS = ("steps", "checkpoint", "validation", "keep_rollouts_every", "max_skipped", "chunk")
FREE_ENGINE_KEYS = ("layout", "compile", "recompute", "timeout_s", "device")
_PUT_BACK = "put back the weights that it started from"


class LineageError(CheckpointError):
    """A stage's checkpoints are another recipe's, other data's or another parent's."""

    exit_code = ExitCode.USAGE


@dataclasses.dataclass
class Lineage:
    """Where a stage's weights or rows come from, as hashes.

    ``inputs``: of the artifacts that it reads, by name. ``part``: of a multimodal model that a run
    starts from, in words, what is read and what is left out.
    """

    config_hash: str
    data_hash: str
    parent_hash: str
    parent: str = ""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    part: str = ""


def identity(run: RunConfig, stage: JobConfig, tokenizer_hash: str) -> list[Any]:
    """All that decides what a stage computes, but its data and its parent, as plain JSON."""
    body = stage.model_dump(mode="json", exclude=set(FREE_KEYS))
    body.get("batch", {}).pop("micro_batch", None)
    for part in (body, *filter(None, body.get("roles", {}).values())):
        part.pop("ranks", None)
        (part.get("optimizer") or {}).pop("fused", None)  # which kernel
        own = part["engine"]  # of any kind: what is computed is the same
        shared = {k: own[k] for k in EngineConfig.model_fields if k not in FREE_ENGINE_KEYS}
        part["engine"] = shared | {"kind": DEFAULT_ENGINE}
    return [run.seed, run.model.model_dump(mode="json"), tokenizer_hash, body]


def lineage_of(
    run: RunConfig,
    stage: JobConfig,
    tokenizer_hash: str,
    data_hash: str,
    parent: Path | None,
    artifacts: Mapping[str, str] | None = None,
) -> Lineage:
    """The lineage that a stage of this run has, and that its checkpoints must have."""
    body = json.dumps(identity(run, stage, tokenizer_hash), sort_keys=True)
    return Lineage(
        config_hash=xxhash.xxh3_128_hexdigest(body.encode()),
        data_hash=data_hash,
        parent_hash=manifest.read(parent).digest if parent else initial_hash(run),
        parent=str(parent.relative_to(run.directory)) if parent else _pinned(run),
        inputs={reader.from_: (artifacts or {})[reader.from_] for _, reader in artifacts_of(stage)},
        part="" if parent or (start := run.start) is None else text_part.described(start),
    )


def _pinned(run: RunConfig) -> str:
    """The commit that a run starts from, if it is one of the hub's."""
    start = run.init_from
    return hub.pinned(start, "model") if start is not None and hub.is_hub_name(start) else ""


def check_lineage(
    run: RunConfig,
    stage: StageConfig,
    tokenizer_hash: str,
    stored: Mapping[str, Any],
    wanted: Lineage,
    path: Path,
) -> None:
    """Refuse to go on from a checkpoint (``path``) of another config, other data, another parent.

    Raises LineageError that names what differs.
    """
    changed = changed_hashes(stored, wanted)
    told = ""
    if "config" in changed:
        differences = _differences(path, stage.name, identity(run, stage, tokenizer_hash))
        if not differences:
            changed.remove("config")
        told = f" ({'; '.join(differences[:3])})"
    if "parent checkpoint" in changed:
        source = f"init_from: {run.init_from}" if run.init_from else "the weights of a seed"
        before = str(stored.get("parent", ""))
        mend = f"write init_from: {before}" if hub.is_hub_name(before) else _PUT_BACK
        told += f" (now {wanted.parent or source}; {mend})"
    if changed:
        _refuse(stage.name, "checkpoints", changed, told)


def check_hashes(
    stage: str, what: str, stored: Mapping[str, Any], wanted: Lineage, told: str = ""
) -> None:
    """`check_lineage` of what has no recipe beside it: the ``what`` of a job."""
    if changed := changed_hashes(stored, wanted):
        _refuse(stage, what, changed, told)


def changed_hashes(stored: Mapping[str, Any], wanted: Lineage) -> list[str]:
    """In words, what differs between a stored lineage and one of now."""
    names = {"config_hash": "config", "data_hash": "data", "parent_hash": "parent checkpoint"}
    changed = [w for k, w in names.items() if stored[k] != getattr(wanted, k)]
    before = stored.get("inputs", {})
    unlike = sorted(k for k, v in wanted.inputs.items() if before.get(k) != v)
    return [*changed, *(f"artifact {name}" for name in unlike)]


def _refuse(stage: str, what: str, changed: Sequence[str], told: str) -> NoReturn:
    raise LineageError(
        f"stage {stage}: its {what} were made with another {' and '.join(changed)}{told}. Continue "
        "with the old recipe, or start afresh with another run_dir or stage name"
    )


def _differences(path: Path, stage: str, wanted: list[Any]) -> list[str]:
    """What the recipe stored in a checkpoint says otherwise than ``wanted``, value by value."""
    try:
        run = load_config(path / RUN_FILE).config
        old = next(s for s in run.training if s.name == stage)
        stored = identity(run, old, load_tokenizer(path).hash)
    except (ShardwiseError, OSError, StopIteration) as error:
        return [f"its own recipe cannot be read: {error or 'it has no such stage'}"]
    before, after = dict(_values(stage, stored)), dict(_values(stage, wanted))
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [f"{k}: {before.get(k, 'absent')} there, {after.get(k, 'absent')} here" for k in keys]


def _values(stage: str, said: list[Any]) -> Iterator[tuple[str, Any]]:
    """Every value of an `identity` under its dotted key; secrets are masked, as in what is kept."""
    names = ("seed", "model", "the tokenizer", f"stages.{stage}")
    for name, part in zip(names, redact_data(said), strict=True):
        yield from _leaves(name, part)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _leaves(f"{key}.{name}", part)
    elif isinstance(value, list) and value:
        for i, part in enumerate(value):
            yield from _leaves(f"{key}.{i}", part)
    else:
        yield key, value
