"""Which safetensors files of a Hugging Face folder hold its weights: as transformers finds them.

Where transformers would read another tensor than the one that was meant, or leave it random, with a
warning or without, the folder is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwise import safe_files
from shardwise.errors import CheckpointError, UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"


class MissingModelError(UserError, CheckpointError):
    """There is no model at a path; nothing of it is damaged."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises CheckpointError, MissingModelError when there is no file."""
    try:
        found = safe_files.parse_json(safe_files.read_bytes(path))
    except FileNotFoundError:
        raise MissingModelError(
            f"{path} does not exist; a Hugging Face folder holds config.json and *.safetensors"
            f"{_instead(path.parent)}"
        ) from None
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return found


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a folder that transformers would take for an adapter's."""
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder / _ADAPTER}: the folder holds an adapter, whose base model is elsewhere, and "
            "adapters are not read; merge it (peft: merge_and_unload, then save_pretrained), or "
            f"remove {_ADAPTER} if the folder's own weights are meant"
        )


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its stored name, one at a time; the folder is checked at once."""
    files = _files(folder)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for path in files:
            try:
                safe_files.open_regular(path).close()  # a FIFO would be waited for
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (not a mapping)
                        yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or missing: {error}") from None

    return stream()


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():  # counts more than an index, which may be an older model's
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{_instead(folder)}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    outside = [n for n in files if not isinstance(n, str) or Path(n).name != n]
    if outside or not isinstance(weight_map, dict) or not files:
        raise CheckpointError(
            f"{folder / INDEX}: weight_map must name files of this folder, not {outside}"
        )
    for name in sorted(set(files)):
        _check_shard(folder, name, weight_map)
    return [folder / name for name in sorted(set(files))]


def _check_shard(folder: Path, shard: str, weight_map: dict[str, str]) -> None:
    """A shard holds what the index gives to it, and nothing else."""
    index = folder / INDEX
    try:
        safe_files.open_regular(folder / shard).close()
        with safe_open(folder / shard, framework="pt") as file:
            held = set(file.keys())
    except FileNotFoundError:
        raise CheckpointError(f"{index} names {shard}, which is not there") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / shard} is damaged: {error}") from None
    for name in sorted(held):
        if weight_map.get(name) != shard:
            other = weight_map.get(name, "no file")
            raise CheckpointError(
                f"{index} does not fit its shards: it gives {name} to {other}, and {shard} holds "
                "it too, so which one is meant cannot be known; remove the wrong tensor, or write "
                "index and shards anew"
            )
    for name, given in sorted(weight_map.items()):
        if given == shard and name not in held:
            raise CheckpointError(
                f"{index} does not fit its shards: it gives {name} to {shard}, which does not hold "
                "it; write index and shards anew"
            )


def _instead(folder: Path) -> str:
    """What a folder without readable weights holds, and what to do with it."""
    for pattern, mend in (
        (_ADAPTER, "it is an adapter: merge it into its base model first"),
        ("*.gguf", "give the .gguf file itself"),
        ("*-of-*.safetensors", f"shards are read by their index, {INDEX}: fetch it too"),
        ("model.*.safetensors", f"a variant is not chosen by itself: rename it to {SINGLE}"),
        ("*.safetensors", f"rename it to {SINGLE} if it has Hugging Face's names"),
        ("*.bin", "pickled weights are not loaded: convert them to safetensors first"),
        ("*.pt*", "pickled weights are not loaded: convert them to safetensors first"),
    ):
        if found := sorted(folder.glob(pattern)):
            return f" (there is {found[0].name}; {mend})"
    return ""
