"""Which safetensors files of a Hugging Face folder hold its weights: as transformers finds them.

Where transformers would read another tensor than the one that was meant, or leave it random, with a
warning or without, the folder is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwise import safe_files
from shardwise.errors import CheckpointError
from shardwise.models.config_file import instead, read_json
from shardwise.models.text_part import INDEX as INDEX
from shardwise.models.text_part import SINGLE as SINGLE


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
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}{instead(folder)}")
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
