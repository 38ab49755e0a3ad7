"""Megatron-core's distributed checkpoints (format ``torch_dist``): PyTorch's DCP, and two files.

Each rank's ``__R_N.distcp`` is a row of archives as `torch.save` writes them. ``.metadata``, a
pickle (see `pickles`), says which box of which tensor each of them is, so it does not matter how
many ranks there were. ``metadata.json`` names the format, ``common.pt`` has what all ranks share.

Names and numbers only: which model they are of is `megatron_names`' matter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwise import safe_files
from shardwise.checkpoint.pickles import archive
from shardwise.checkpoint.pickles.archive import Stored, Thing, UnreadableError
from shardwise.errors import DataError, UserError

METADATA, FORMAT, COMMON = ".metadata", "metadata.json", "common.pt"
POINTER = "latest_checkpointed_iteration.txt"
OTHERS = re.compile(r"(chained_\d+\.)?optimizer\..*")  # tensors that are no weights
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)")  # kind, parameter
MASTERS = ("fp32_param", "param")  # kinds that are weights
_DCP = "torch.distributed.checkpoint."
# Options of Megatron's that change what its weights mean, by its names.
MEANINGS = ("rotary_interleaved", "apply_layernorm_1p")

Box = tuple[tuple[int, int], ...]  # by axis: from, to


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Whole tensors of a model by Megatron's names."""

    path: Path  # of what describes them
    boxes: Mapping[str, Mapping[Box, Stored]]
    shapes: Mapping[str, tuple[int, ...]]
    states: Mapping[str, Checkpoint] = dataclasses.field(default_factory=dict)  # by kind
    unread: str = ""  # why the optimizer's state is left out
    updates: int | None = None
    iteration: int = 0

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """Or of layers, stacked on the first axis, one of them."""
        region = tuple((0, n) for n in self.shapes[name])
        if layer is not None:
            region = ((layer, layer + 1), *region[1:])
        found = [(cut, box) for box in self.boxes[name] if (cut := _common(region, box))]
        size = sum(_volume(cut) for cut, _ in found)
        apart = not any(_common(a, b) for i, (a, _) in enumerate(found) for b, _ in found[:i])
        if size != _volume(region) or not apart:
            raise UnreadableError(f"{self.path}: the parts of {name} are not the whole of it")
        dtype = self.boxes[name][found[0][1]].dtype
        whole = torch.empty([b - a for a, b in region], dtype=dtype)
        for cut, box in found:
            part = self.boxes[name][box].tensor().reshape([b - a for a, b in box])
            whole[_within(cut, region)] = part[_within(cut, box)]
        return whole if layer is None else whole[0]


def _common(one: Box, other: Box) -> Box | None:
    """What both have; None: nothing."""
    cut = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return cut if all(a < b for a, b in cut) else None


def _volume(box: Box) -> int:
    return math.prod(b - a for a, b in box)


def _within(cut: Box, box: Box) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(cut, box))


# --- which files ----------------------------------------------------------------------------------


def find(path: Path) -> Path | None:
    """The folder of one checkpoint: ``path``, or the one that its pointer names; None: none."""
    if (path / METADATA).exists() or _format(path) is not None:
        return path
    try:
        said = safe_files.read_text(path / POINTER, 4096).strip()
    except (OSError, DataError):
        return None
    if said.isascii() and said.isdigit():
        return path / f"iter_{int(said):07d}"
    return path / "release" if said == "release" else None


def _format(folder: Path) -> Any:
    """What Megatron calls its format; None: it says nothing."""
    try:
        said = safe_files.parse_json(safe_files.read_bytes(folder / FORMAT, 1 << 16))
    except (OSError, DataError, ValueError):
        return None
    return said.get("sharded_backend") if isinstance(said, dict) else None


def read(folder: Path) -> Checkpoint:
    """Raises UserError, which begins with the file at fault, for what is damaged or incomplete."""
    if (folder / FORMAT).exists() and (kind := _format(folder)) != "torch_dist":
        raise UserError(
            f"{folder / FORMAT}: names the format {kind!r}; torch_dist is read, into which "
            "Megatron-LM itself converts (--ckpt-convert-format torch_dist)"
        )
    for name in (FORMAT, METADATA, COMMON):
        if not (folder / name).exists():
            raise UserError(
                f"{folder / name}: is missing; read are checkpoints of Megatron-core's torch_dist "
                "format, all of their files in one folder"
            )
    common = archive.read([folder / COMMON])[0].value
    _check_meaning(folder / COMMON, common)
    path = folder / METADATA
    try:
        found = _described(path, archive.read_plain(path))
        iteration = common.get("iteration") if isinstance(common, dict) else None
        iteration = iteration if isinstance(iteration, int) else 0
        updates = _updates(common.get("optimizer")) if isinstance(common, dict) else None
        updates = iteration if updates is None and found.states else updates
        return dataclasses.replace(found, updates=updates, iteration=iteration)
    except UserError:  # a ValueError too, where it is of damage
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnreadableError(f"{path}: describes no tensors: {error!r}") from None


def _updates(said: Any) -> int | None:
    """How many an optimizer has made, where one of several forms says so."""
    if isinstance(said, dict):
        for key in ("common_step", "step"):
            if isinstance(said.get(key), Stored):
                return int(said[key].tensor())
            if isinstance(said.get(key), int | float):
                return int(said[key])
        return next((n for v in said.values() if (n := _updates(v)) is not None), None)
    if isinstance(said, list):
        return next((n for v in said if (n := _updates(v)) is not None), None)
    return None


def _check_meaning(path: Path, value: Any) -> None:
    """Raise UserError for weights that are not what their names say."""
    found = value.get("args") if isinstance(value, dict) else None
    said = found.state if isinstance(found, Thing) and isinstance(found.state, dict) else {}
    for option in MEANINGS:
        if said.get(option):
            raise UserError(f"{path}: was trained with {option}, which no model of ours has")


# --- what is in them ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    name: str
    box: Box
    at: archive.At


def _described(path: Path, said: Any) -> Checkpoint:
    storage: dict[Any, Thing] = said.state["storage_data"]
    places = {index: _place(path, info) for index, info in storage.items()}
    if len(set(places.values())) < len(places):
        raise UnreadableError(f"{path}: says of two tensors that they are kept in one place")
    for file in sorted({place.path for place in places.values()}):
        if not file.exists():
            raise UserError(f"{file}: is missing; {path} names it")
    shapes: dict[str, tuple[int, ...]] = {}
    kinds: dict[str, dict[str, str]] = {}  # of states: parameter, under which name
    unread = ""
    for name, about in said.state["state_dict_metadata"].items():
        if about.of == f"{_DCP}metadata.BytesStorageMetadata":
            continue
        if about.of != f"{_DCP}metadata.TensorStorageMetadata":
            raise UnreadableError(f"{path}: {name} is {about.of}, which is no tensor")
        if OTHERS.fullmatch(name):
            state = STATE.fullmatch(name)
            if state is None:
                unread = f"{name} is of no parameter (Megatron-LM's fully_reshardable form is read)"
                continue
            kinds.setdefault(state[1], {})[state[2]] = name
        shapes[name] = _numbers(about.state["size"])
    wanted = {name: shape for name, shape in shapes.items() if not OTHERS.fullmatch(name)}
    for kind, names in kinds.items():
        if {n: shapes[own] for n, own in names.items()} != wanted:
            unread = unread or f"{kind} is not of the parameters' shapes, each once"
    if unread:
        kinds = {}
    read = [*wanted, *(own for names in kinds.values() for own in names.values())]
    described = said.state["state_dict_metadata"]
    parts = [part for name in read for part in _parts(path, name, described[name], places)]
    opened = archive.read([part.at for part in parts])
    boxes: dict[str, dict[Box, Stored]] = {part.name: {} for part in parts}
    for part, one in zip(parts, opened):
        value, beside = one.value, boxes[part.name]
        same = {stored.dtype for stored in beside.values()}
        if (
            not isinstance(value, Stored)
            or value.numel != _volume(part.box)
            or same - {value.dtype}
            or part.box in beside
        ):
            raise UnreadableError(f"{part.at.path}: holds another {part.name} than {path} says")
        beside[part.box] = value
    states = {
        kind: Checkpoint(path, {name: boxes[own] for name, own in names.items()}, wanted)
        for kind, names in kinds.items()
    }
    return Checkpoint(path, {name: boxes[name] for name in wanted}, wanted, states, unread)


def _parts(
    path: Path, name: str, about: Thing, places: Mapping[Any, archive.At]
) -> Iterator[_Part]:
    shape = _numbers(about.state["size"])
    for chunk in about.state["chunks"]:
        offsets, sizes = (_numbers(chunk.state[key]) for key in ("offsets", "sizes"))
        box = tuple((a, a + n) for a, n in zip(offsets, sizes, strict=True))
        if len(box) != len(shape) or any(b > n for (_, b), n in zip(box, shape)):
            raise UnreadableError(f"{path}: a part of {name} does not lie in it")
        if (name, offsets) not in places:
            raise UnreadableError(f"{path}: does not say where {name} at {offsets} is kept")
        yield _Part(name, box, places[name, offsets])


def _place(path: Path, info: Thing) -> archive.At:
    file, extra = info.state["relative_path"], info.state.get("transform_descriptors")
    if Path(file).name != file:
        raise UnreadableError(f"{path}: names the file {file!r}, which is none beside it")
    if extra:
        raise UserError(f"{path.parent / file}: is compressed or encrypted ({extra}): not read")
    offset, length = _numbers((info.state["offset"], info.state["length"]))
    return archive.At(path.parent / file, offset, length)


def _numbers(values: Any) -> tuple[int, ...]:
    if any(type(n) is not int or n < 0 for n in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)
