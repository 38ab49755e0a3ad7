"""DeepSpeed's checkpoints (Rasley et al. 2020): ZeRO's shards of any stage, and universal ones.

A rank's file holds flat stretches of masters and moments, one for each group of parameters, and
where each parameter lies in them (stages 1 and 2), or it follows from the shapes (stage 3). A
universal checkpoint has a folder for each parameter. Either is pickled, see `pickles`.

Names and numbers only: which model they are of is `convert`'s matter.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise import safe_files
from shardwise.checkpoint.pickles import archive
from shardwise.checkpoint.pickles.archive import Archive, Stored, Thing, UnreadableError
from shardwise.errors import DataError, UserError

POINTERS = ("latest", "latest_universal")
MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"((?:bf16_|fp16_)?)zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
OTHERS = (
    (re.compile(r"layer_.*\.pt|mp_rank_\d+_\d+_model_states\.pt"), "a pipeline"),
    (re.compile(r".*exp(?:p|ert)_.*\.pt"), "experts"),
    (re.compile(r".*mp_rank_0*[1-9]\d*_.*\.pt"), "tensor parallelism"),
)
MASTER = "fp32"
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Whole tensors by the names of the module that was trained, one at a time."""

    folder: Path
    shapes: Shapes  # of all parameters
    frozen: frozenset[str]  # of those that were not trained
    shared: frozenset[str]  # other names of parameters among them
    states: tuple[str, ...]  # what the optimizer kept of each, such as exp_avg
    updates: int | None  # of the optimizer; None: it does not count
    steps: int
    skipped: int
    read: Callable[[str, str], Tensor]  # of a name ``fp32``, or a state


# --- which files ----------------------------------------------------------------------------------


def find(path: Path) -> Path | None:
    """The folder of one checkpoint: ``path``, or the one that its ``latest`` names; None: none."""
    if _is_universal(path) or any(_is_shard(p.name) for p in path.glob("*.pt")):
        return path
    for pointer in POINTERS:
        try:
            tag = safe_files.read_text(path / pointer, 4096).strip()
        except (OSError, DataError):
            continue
        if tag not in ("", ".", "..") and Path(tag).name == tag:
            return path / tag
    return None


def _is_universal(folder: Path) -> bool:
    return (folder / "zero").is_dir()


def _is_shard(name: str) -> bool:
    return bool(MODEL.fullmatch(name) or OPTIMIZER.fullmatch(name))


def read(folder: Path) -> Checkpoint:
    """Raises UserError, which begins with the file at fault, for what is damaged or incomplete."""
    if not folder.is_dir():
        raise UserError(f"{folder}: does not exist, though it is said to be the latest checkpoint")
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".pt")
    for name in names:
        for pattern, what in OTHERS:
            if pattern.fullmatch(name):
                raise UserError(
                    f"{folder / name}: belongs to a model cut by {what}, which is not read; save "
                    "it with ZeRO alone"
                )
    models = {int(m[1] or 0): m[0] for m in map(MODEL.fullmatch, names) if m}
    if _is_universal(folder):
        return _universal(folder, [folder / models[rank] for rank in sorted(models)])
    shards: dict[int, str] = {}
    for match in filter(None, map(OPTIMIZER.fullmatch, names)):
        if int(match[2]) in shards:
            raise UserError(f"{folder / match[0]}: and {shards[int(match[2])]} are of one rank")
        shards[int(match[2])] = match[0]
    if 0 not in models:
        raise UserError(f"{folder / 'mp_rank_00_model_states.pt'}: is missing")
    return _of_ranks(folder, models, shards)


def _of_ranks(folder: Path, models: dict[int, str], shards: dict[int, str]) -> Checkpoint:
    opened = archive.read([folder / name for name in (*models.values(), *shards.values())])
    model, shard = dict(zip(models, opened)), dict(zip(shards, opened[len(models) :]))
    said = _Tree(model[0])
    world, stage = said.whole("dp_world_size"), _stage(said)
    cut = any(name.startswith("zero_") for name in models.values())
    if stage or shards:
        prefix = next(iter(shards.values()), "zero_").partition("zero_")[0]
        _complete(folder, shard, world, prefix + "zero_pp_rank_{}_mp_rank_00_optim_states.pt")
    if cut:
        _complete(folder, model, world, "zero_pp_rank_{}_mp_rank_00_model_states.pt")
    if not shards:
        return _whole(folder, said)
    trees = [_Tree(shard[rank]).inside("optimizer_state_dict") for rank in range(world)]
    ranks = [_Rank(tree) for tree in trees]
    for rank in ranks:
        if rank.world != world:
            raise UnreadableError(
                f"{rank.tree.path}: is one of {rank.world}, and its model's file says {world}"
            )
    groups = [dict(group) for group in said.get("param_shapes")]
    own: dict[str, tuple[int, ...]] = {k: tuple(v) for group in groups for k, v in group.items()}
    pieces = _by_shapes(ranks, groups) if cut else _by_addresses(ranks, groups)
    frozen = _frozen([_Tree(model[rank]) for rank in (range(world) if cut else (0,))], own)

    def of(kind: str, name: str) -> Tensor:
        if name in frozen:
            return frozen[name].tensor()
        found = [ranks[r].flat(kind, g)[start : start + n] for r, g, start, n in pieces[name]]
        return _joined(trees[0].path, name, own[name], found)

    if missing := sorted(own.keys() - pieces.keys()):
        raise UnreadableError(f"{trees[0].path}: does not say where {missing[0]} lies")
    steps = {step for rank in ranks for step in rank.steps}
    return _checkpoint(folder, said, own, frozen, ranks[0].states, steps, of)


def _checkpoint(
    folder: Path,
    said: _Tree,
    own: Shapes,
    frozen: Mapping[str, _Frozen],
    states: tuple[str, ...],
    steps: set[int],
    of: Callable[[str, str], Tensor],
) -> Checkpoint:
    if len(steps) > 1:
        raise UserError(f"{folder}: its parameters have had {sorted(steps)} updates, not as many")
    shapes = {**own, **{name: part.shape for name, part in frozen.items()}}
    shared = {k: v for k, v in (said.value.get("shared_params") or {}).items() if v in shapes}
    return Checkpoint(
        folder,
        shapes | {other: shapes[name] for other, name in shared.items()},
        frozenset(frozen) | {other for other, name in shared.items() if name in frozen},
        frozenset(shared),
        states,
        next(iter(steps), None),
        said.whole("global_steps"),
        said.whole("skipped_steps"),
        lambda kind, name: of(kind, shared.get(name, name)),
    )


def _complete(folder: Path, found: Mapping[int, Any], world: int, form: str) -> None:
    for rank in range(world):
        if rank not in found:
            raise UserError(
                f"{folder / form.format(rank)}: is missing; the checkpoint is of {world} ranks"
            )
    if len(found) > world:
        raise UserError(
            f"{folder / form.format(max(found))}: is one too many; the checkpoint is of {world} "
            "ranks"
        )


def _stage(said: _Tree) -> int:
    config = said.value.get("ds_config")
    config = config if isinstance(config, dict) else {}
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else 0


# --- what is in them ------------------------------------------------------------------------------


class _Tree:
    """A mapping of an archive; what it lacks is an error with the path."""

    def __init__(self, of: Archive, value: Any = None, at: str = "") -> None:
        self.archive, self.path, self.at = of, of.path, at
        self.value: dict[Any, Any] = of.value if value is None else value
        if not isinstance(self.value, dict):
            raise UnreadableError(f"{self.path}: {at or 'what it holds'} is no mapping")

    def get(self, *keys: str) -> Any:
        """Of these names the one that it has: releases differ."""
        for key in keys:
            if self.value.get(key) is not None:
                return self.value[key]
        raise UnreadableError(f"{self.path}: has no {self.at}{keys[0]}")

    def inside(self, *keys: str) -> _Tree:
        """The mapping under one of these names."""
        return _Tree(self.archive, self.get(*keys), f"{self.at}{keys[0]}.")

    def whole(self, key: str) -> int:
        """A count."""
        found = self.get(key)
        if type(found) is not int or found < 0:
            raise UnreadableError(f"{self.path}: {self.at}{key} is no count: {found!r}")
        return found

    def stored(self, key: Any) -> Stored:
        """A tensor."""
        found = self.value.get(key)
        if not isinstance(found, Stored):
            raise UnreadableError(f"{self.path}: {self.at}{key} is no tensor")
        return found


class _Rank:
    """The flat tensors of one rank's file."""

    def __init__(self, tree: _Tree) -> None:
        self.tree = tree
        counts = tree.get("partition_count")
        self.world = int(max(counts) if isinstance(counts, list) else counts)
        masters = tree.get("single_partition_of_fp32_groups", "fp32_flat_groups")
        inner = tree.inside("base_optimizer_state", "optimizer_state_dict")
        states, groups = inner.inside("state"), inner.get("param_groups")
        self.flats = {(MASTER, g): self._flat(m, g) for g, m in enumerate(masters)}
        self.sizes = [stored.numel for stored in self.flats.values()]
        self.steps: set[int] = set()
        kinds: dict[str, None] = {}
        for g, size in enumerate(self.sizes):
            state = states.value.get(g, {})
            step = state.get("step", groups[min(g, len(groups) - 1)].get("step"))
            self.steps |= set() if step is None else {count(self.tree.path, step)}
            for kind, value in state.items():
                if isinstance(value, Stored) and kind != "step" and value.numel == size:
                    self.flats[kind, g] = value
                    kinds[kind] = None
        self.states = tuple(kinds)

    def _flat(self, value: Any, group: int) -> Stored:
        if not isinstance(value, Stored) or len(value.shape) != 1:
            raise UnreadableError(f"{self.tree.path}: the masters of group {group} are no tensor")
        return value

    def flat(self, kind: str, group: int) -> Tensor:
        """Masters or a state of a group."""
        if (kind, group) not in self.flats:
            raise UnreadableError(f"{self.tree.path}: has no {kind} of group {group}")
        return self.flats[kind, group].tensor()


@dataclasses.dataclass(frozen=True)
class _Frozen:
    """A parameter that was not trained: no optimizer has it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    parts: list[Stored]

    def tensor(self) -> Tensor:
        """In the dtype that it computes in."""
        parts = [part.tensor().reshape(-1) for part in self.parts]
        return _joined(self.path, self.name, self.shape, parts)


def _frozen(models: list[_Tree], own: Shapes) -> dict[str, _Frozen]:
    """By name; whole in the first file, or, under stage 3, a part in each."""
    said = models[0]
    shapes = said.value.get("frozen_param_shapes")
    if shapes is not None:
        held = [m.inside("frozen_param_fragments") for m in models] if shapes else []
        return {
            name: _Frozen(said.path, name, tuple(shape), [h.stored(name) for h in held])
            for name, shape in shapes.items()
        }
    module = said.inside("module")  # stage 1 does not tell them from the rest
    other = {*own, *(said.value.get("shared_params") or ())}
    other |= set(said.value.get("buffer_names") or ())
    return {
        name: _Frozen(said.path, name, value.shape, [value])
        for name, value in module.value.items()
        if isinstance(value, Stored) and name not in other
    }


Pieces = dict[str, list[tuple[int, int, int, int]]]  # by name: rank, group, start, elements


def _by_addresses(ranks: list[_Rank], groups: list[dict[str, tuple[int, ...]]]) -> Pieces:
    """Stages 1 and 2: each file says where its fragments lie.

    In 0.19.8 that is wrong with ``round_robin_gradients``: addresses are those of the order that
    parameters had before.
    """
    found: Pieces = {}
    for r, rank in enumerate(ranks):
        for g, addresses in enumerate(rank.tree.get("param_slice_mappings")):
            for name, address in addresses.items():
                at = address.state if isinstance(address, Thing) else None
                if not isinstance(at, dict) or not {"start", "numel"} <= at.keys():
                    raise UnreadableError(f"{rank.tree.path}: no address of {name}")
                found.setdefault(name, []).append((r, g, int(at["start"]), int(at["numel"])))
    for g, shapes in enumerate(groups):
        if [name for name, pieces in found.items() if pieces[0][1] == g] != list(shapes):
            raise UnreadableError(
                f"{ranks[0].tree.path}: its addresses are of another order of parameters than the "
                "shapes in the model's file, as DeepSpeed writes them with round_robin_gradients; "
                "save it without"
            )
    return found


def _by_shapes(ranks: list[_Rank], groups: list[dict[str, tuple[int, ...]]]) -> Pieces:
    """Stage 3: of each parameter equal parts, in order, the last one filled up."""
    found: Pieces = {}
    for g, shapes in enumerate(groups):
        at = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // len(ranks))
            left = [max(0, min(part, numel - part * r)) for r in range(len(ranks))]
            found[name] = [(r, g, at, n) for r, n in enumerate(left)]
            at += part
        for rank in ranks:
            if len(rank.sizes) != len(groups) or rank.sizes[g] != at:
                raise UnreadableError(
                    f"{rank.tree.path}: its groups of masters are not as long as the shapes say"
                )
    return found


def _joined(path: Path, name: str, shape: tuple[int, ...], parts: list[Tensor]) -> Tensor:
    if sum(part.numel() for part in parts) < math.prod(shape):
        raise UnreadableError(f"{path}: holds too little of {name}")
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole[: math.prod(shape)].reshape(shape)


def count(path: Path, step: Any) -> int:
    """Updates, however a release keeps them."""
    value = step.tensor().item() if isinstance(step, Stored) and step.numel == 1 else step
    if not isinstance(value, int | float) or not 0 <= value < 2**53 or value != int(value):
        raise UnreadableError(f"{path}: its optimizer counts no updates: {value!r}")
    return int(value)


# --- without ZeRO ---------------------------------------------------------------------------------


def _whole(folder: Path, said: _Tree) -> Checkpoint:
    """Stage 0: one file, whose optimizer numbers its parameters."""
    module = said.inside("module")
    shared: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    first: dict[Any, str] = {}
    buffers = set(said.value.get("buffer_names") or ())
    for name in module.value:
        if name in buffers:
            continue
        stored = module.stored(name)
        key = (stored.key, stored.offset, stored.shape)
        if key in first:
            shared[name] = first[key]
        else:
            first[key], shapes[name] = name, stored.shape
    outer = said.inside("optimizer")
    inner = outer.inside("optimizer_state_dict") if "fp32_groups" in outer.value else outer
    masters = list(itertools.chain(*outer.value.get("fp32_groups", ())))
    states, groups = inner.inside("state"), inner.get("param_groups")
    order = _numbered(said.path, shapes, groups, states, masters)
    kinds = dict.fromkeys(k for state in states.value.values() for k in state if k != "step")
    steps = {count(said.path, s["step"]) for s in states.value.values() if "step" in s}

    def of(kind: str, name: str) -> Tensor:
        number = order.get(name)
        if kind != MASTER:
            return (
                _Tree(said.archive, states.value.get(number, {}), f"{name}.").stored(kind).tensor()
            )
        if number is None or not masters:
            return module.stored(name).tensor()
        master: Stored = masters[number]
        return master.tensor()

    frozen = {
        name: _Frozen(said.path, name, shape, [module.stored(name)])
        for name, shape in shapes.items()
        if name not in order
    }
    said.value["shared_params"] = shared
    return _checkpoint(folder, said, shapes, frozen, tuple(kinds), steps, of)


def _numbered(
    path: Path, shapes: Shapes, groups: list[Any], states: _Tree, masters: list[Any]
) -> dict[str, int]:
    """Which number of the optimizer's is which parameter."""
    numbers = [n for group in groups for n in group.get("params", ())]
    named = [n for group in groups for n in group.get("param_names", ())]
    names = named if len(named) == len(numbers) else list(shapes)
    order = dict(zip(names, numbers))
    fits = len(names) == len(numbers) and all(
        name in shapes
        and all(
            value.shape == shapes[name]
            for value in (*states.value.get(n, {}).values(), *masters[n : n + 1])
            if isinstance(value, Stored) and value.shape
        )
        for name, n in order.items()
    )
    if not fits or (len(groups) > 1 and not named):
        raise UserError(
            f"{path}: without ZeRO DeepSpeed numbers what its optimizer holds, and does not say "
            "which number is which parameter if there are several groups; save it with ZeRO 1, or "
            "with torch's named groups (param_names)"
        )
    return order


# --- universal ------------------------------------------------------------------------------------


def _universal(folder: Path, models: list[Path]) -> Checkpoint:
    """``zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt``."""
    zero = folder / "zero"
    files = sorted(p for p in zero.glob("*/*.pt"))
    names = sorted({p.parent.name for p in files})
    if not models:
        raise UserError(f"{folder / 'mp_rank_00_model_states.pt'}: is missing")
    everything = [*models, zero / "optimizer_state.pt", *files]
    opened = {a.path: a for a in archive.read(everything)}
    said, common = _Tree(opened[models[0]]), _Tree(opened[zero / "optimizer_state.pt"])
    kinds = dict.fromkeys(p.stem for p in files if p.stem not in (MASTER, "step"))
    for name in names:
        for kind in (MASTER, *kinds):
            if zero / name / f"{kind}.pt" not in opened:
                raise UserError(f"{zero / name / f'{kind}.pt'}: is missing")
    groups = said.value.get("param_shapes") or []
    known = {name: tuple(shape) for group in groups for name, shape in group.items()}
    if missing := sorted(known.keys() - set(names)):
        raise UserError(f"{zero / missing[0]}: is missing")

    def stored(kind: str, name: str) -> Stored:
        held = opened[zero / name / f"{kind}.pt"]
        if isinstance(held.value, Stored):
            return held.value
        return _Tree(held).stored("param")

    shapes = {name: known.get(name, stored(MASTER, name).shape) for name in names}
    steps = {count(p, opened[p].value) for p in files if p.stem == "step"}
    if not steps and "optimizer_state_dict" in common.value:
        states = common.inside("optimizer_state_dict", "base_optimizer_state").inside("state")
        found = (s.get("step") for s in states.value.values())
        steps = {count(common.path, s) for s in found if s is not None}

    frozen = _frozen([_Tree(opened[path]) for path in models], shapes)

    def of(kind: str, name: str) -> Tensor:
        if name in frozen:
            return frozen[name].tensor()
        held = stored(kind, name)
        return _joined(held.archive.path, name, shapes[name], [held.tensor().reshape(-1)])

    return _checkpoint(folder, said, shapes, frozen, tuple(kinds), steps, of)


def config_of(folder: Path) -> Path | None:
    """Where the model's config.json stands: beside the files, or beside ``latest``."""
    return next((p for p in (folder, folder.parent) if (p / "config.json").is_file()), None)
