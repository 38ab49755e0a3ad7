"""What one node has: versions, code, the recipe and its files, room, GPUs. All as JSON values."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

import shardwise
from shardwise import hub
from shardwise.config.export import config_hash
from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.config.start import located
from shardwise.data.formats import FORMATS
from shardwise.errors import DataError
from shardwise.launch.doctor import version
from shardwise.launch.preflight import gpus
from shardwise.launch.preflight.board import Board, Place, within
from shardwise.recipes.choices import SAVED
from shardwise.stages.run import preflight
from shardwise.stages.samples import pending_parts

SHM = Path("/dev/shm")
PACKAGES = ("numpy", "safetensors", "tokenizers", "pydantic", "transformers", "deepspeed")
_SAMPLED, _SAMPLE = 64, 1 << 16  # of how many files the first bytes are compared, and how many


def facts(
    place: Place, board: Board, seconds: float, recipe: Any, overrides: Sequence[str]
) -> dict[str, Any]:
    """What is to be told and compared, by part: versions, code, gpus, space, recipe.

    ``errors``: what went wrong, by part; one that hangs is an error, and the others are still told.
    """
    del board
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "code": code_hash,
        "gpus": lambda: gpus.query(seconds),
        "space": space,
    }
    if recipe is not None:
        parts["recipe"] = lambda: of_recipe(recipe, overrides, place.world)
    answers = within(seconds, parts)
    errors = {name: answer.error for name, answer in answers.items() if answer.error}
    return {name: answer.value for name, answer in answers.items()} | {"errors": errors}


def versions() -> dict[str, str]:
    """Of what must be the same everywhere."""
    found = {
        "python": platform.python_version(),
        "shardwise": shardwise.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "none",
    }
    if torch.cuda.is_available():  # a GPU's path: NCCL must be one on all nodes
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found | {name: v for name in PACKAGES if (v := version(name))}


def code_hash() -> str:
    """xxh3-128 of the package's and the kernels' source, by name and content."""
    roots = [Path(shardwise.__file__).parent]
    try:
        import shardwise_kernels

        roots.append(Path(next(iter(shardwise_kernels.__path__))))
    except ImportError:
        pass
    total = xxhash.xxh3_128()
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def of_recipe(recipe: Any, overrides: Sequence[str], world: int) -> dict[str, Any]:
    """``{"hash", "folder", "device", "space", "files": {key: manifest}, "checkpoint_bytes"}``.

    Raises ConfigError for what `train` would refuse here.
    """
    loaded = load_config(recipe, overrides)
    run = loaded.config
    preflight(run, world, loaded.provenance)
    trained = 0 if any(getattr(s, "adapter", None) for s in run.stages) else SAVED
    return {
        "hash": config_hash(run),
        "folder": str(run.directory.resolve()),
        "device": run.engine.device,
        "space": free(run.directory.resolve()),
        "files": {key: manifest(files) for key, files in recipe_files(run)},
        "checkpoint_bytes": trained * run.model.num_parameters(),  # type: ignore[attr-defined]
    }


def recipe_files(run: RunConfig) -> Iterator[tuple[str, list[Path]]]:
    """The files that a run reads, by key of the recipe."""
    if run.start is not None:
        yield "init_from", _below(run.start)
    if run.tokenizer.path is not None:
        yield "tokenizer.path", _below(located(run.tokenizer.path))
    for key, part in pending_parts(run):
        data = getattr(part, "data", None)
        for name in ("sources", "validation"):
            for i, source in enumerate(getattr(data, name, ())):
                told = source.told(getattr(data, "reads", tuple(FORMATS)))
                if told.path is not None:  # the standard library belongs to the version of Python
                    yield f"{key}.data.{name}.{i}", told.files()
        if isinstance(path := getattr(getattr(part, "task", None), "path", None), Path):
            yield f"{key}.task.path", _below(path)


def _below(path: Path) -> list[Path]:
    place = hub.local_folder(path, "dataset") if hub.is_hub_name(path) else path
    return sorted(f for f in place.rglob("*") if f.is_file()) if place.is_dir() else [place]


def manifest(files: Sequence[Path]) -> dict[str, Any]:
    """Number, bytes, and a hash of names, sizes and what the files begin with.

    Of more than 64 files, the contents of 64, evenly spread, are looked at. Raises DataError for
    one that cannot be read.
    """
    total, size = xxhash.xxh3_128(), 0
    step = -(-len(files) // _SAMPLED) or 1
    for i, file in enumerate(files):
        try:
            length = file.stat().st_size
            with file.open("rb") as stream:
                head = stream.read(_SAMPLE) if i % step == 0 else b""
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error
        size += length
        total.update(f"{file.name}\0{length}\0".encode() + head)
    return {"count": len(files), "bytes": size, "hash": total.hexdigest()}


def space() -> dict[str, Any]:
    """Bytes of temporary files and shared memory that are free, each with its place."""
    places = {"temporary files": Path(tempfile.gettempdir()), "shared memory": SHM}
    return {use: free(place) for use, place in places.items() if place.is_dir()}


def free(place: Path) -> dict[str, Any]:
    """``{"place", "free"}`` of the file system that holds, or would hold, a folder."""
    while not place.exists():
        place = place.parent
    return {"place": str(place), "free": shutil.disk_usage(place).free}
