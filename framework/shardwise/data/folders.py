"""Which files hold the rows of a data set: a file, a glob, or a folder as others lay it out.

A folder is one of

- what ``datasets`` saved (``save_to_disk``): its state.json lists the files in order, and a
  dataset_dict.json the splits, each a folder;
- a data set of the hub, as a clone or in its cache: the README's ``configs`` say which files are
  of which subset and split;
- any other: files whose names, or whose folders, say ``train``, ``validation`` or ``test`` are of
  that split, as ``datasets`` reads them; where none does, all are of ``train``.

Nothing here runs a data set's own code, and nothing imports ``datasets``.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shardwise import hub, safe_files
from shardwise.data import files as data_files
from shardwise.data.readers import ROW_SUFFIXES
from shardwise.data.streams import suffix_of
from shardwise.errors import DataError, ShardwiseError

# What the libraries write about data, which is no data.
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
Subsets = Mapping[str, Mapping[str, Sequence[Path]]]  # files by subset and split


def row_files(path: Path | str, split: str = "train", subset: str | None = None) -> list[Path]:
    """The files of one split that hold rows, all of one kind.

    ``path``: a file, folder, glob or name on the hub (`hub.local_folder`). Raises DataError where
    there are none, and UserError for a name that cannot be had.
    """
    place = hub.local_folder(path, kind="dataset")
    if not place.is_dir():
        if split != "train" or subset is not None:
            raise DataError(
                f"{path}: split {split} divides a folder of a data set only; name its file"
            )
        return data_files.find_files(place, ROW_SUFFIXES)
    subsets = _subsets(place)
    if not subsets:
        raise DataError(f"{path}: no files ending in {', '.join(ROW_SUFFIXES)} there")
    if subset is None and len(subsets) > 1 and "default" not in subsets:
        raise DataError(f"{path}: has several subsets; say which: {_names(subsets)}")
    subset = subset or ("default" if "default" in subsets else next(iter(subsets)))
    if subset not in subsets:
        raise DataError(f"{path}: has no subset {subset}; it has: {_names(subsets)}")
    splits = subsets[subset]
    if split not in splits:
        raise DataError(f"{path}: has no split {split}; it has: {_names(splits)}")
    found = list(splits[split])
    kinds = sorted({suffix_of(f) for f in found})
    if strange := next((f for f in found if suffix_of(f) not in ROW_SUFFIXES), None):
        raise DataError(f"{strange}: not of {'/'.join(ROW_SUFFIXES)}, which are read as rows")
    if len(kinds) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({', '.join(kinds)}); name those to read by a "
            f"glob: {place / ('*' + kinds[0])}"
        )
    return found


def splits_of(path: Path | str, subset: str | None = None) -> list[str]:
    """The names of a data set's splits; of a file, or of files that are not divided: train."""
    place = hub.local_folder(path, kind="dataset")
    if not place.is_dir():
        return ["train"]
    subsets = _subsets(place)
    chosen = subsets.get(subset or "default") or next(iter(subsets.values()), {})
    return list(chosen)


def _names(found: Iterable[str]) -> str:
    return ", ".join(found) or "none"


def _subsets(folder: Path) -> Subsets:
    saved = _saved(folder)
    if saved is not None:
        return {"default": saved}
    told = _of_readme(folder)
    if told:
        return told
    files = [f for f in data_files.find_files(folder, ROW_SUFFIXES) if _holds_rows(f)]
    return {"default": _by_name(folder, files)} if files else {}


def _holds_rows(file: Path) -> bool:
    # cache-: what ``datasets`` computed from others.
    return file.name not in ABOUT and not file.name.startswith("cache-")


def _saved(folder: Path) -> dict[str, list[Path]] | None:
    """What `save_to_disk` wrote, by split; None for another folder."""
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not all(_is_name(n) for n in names):
            raise DataError(f"{folder / 'dataset_dict.json'}: 'splits' is no list of names")
        return {name: _state(folder / name) for name in names}
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        split = _json(folder / "state.json").get("_split")
        return {split if isinstance(split, str) and split else "train": _state(folder)}
    return None


def _state(folder: Path) -> list[Path]:
    file = folder / "state.json"
    said = _json(file)
    if said.get("_indices_files") or said.get("_indices_data_files"):
        raise DataError(
            f"{file}: keeps a choice of rows beside them, as old versions of datasets did; load "
            "and save it again with a newer one"
        )
    listed = said.get("_data_files")
    names = [f.get("filename") if isinstance(f, dict) else f for f in listed or ()]
    if not names or not all(_is_name(n) for n in names):
        raise DataError(f"{file}: '_data_files' is no list of files")
    return [folder / str(name) for name in names]


def _is_name(value: Any) -> bool:
    """Whether it can be the name of a file in a folder, and of none elsewhere."""
    return isinstance(value, str) and value not in ("", ".", "..") and "/" not in value


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(safe_files.read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: holds no JSON object")
    return found


def _of_readme(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Files by subset and split as the ``configs`` in a README's front matter say."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    try:
        parts = safe_files.read_text(file).split("---\n", 2)
        said = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except (OSError, ShardwiseError, yaml.YAMLError, RecursionError):
        return {}  # a text for people; the files' names say enough
    found: dict[str, dict[str, list[Path]]] = {}
    configs = said.get("configs") if isinstance(said, dict) else None
    for config in configs if isinstance(configs, list) else ():
        if isinstance(config, dict) and config.get("data_files"):
            splits = _matching(folder, config["data_files"])
            if splits:
                found[str(config.get("config_name", "default"))] = splits
    return found


def _matching(folder: Path, said: Any) -> dict[str, list[Path]]:
    """``data_files`` of a README: a pattern, a list of them, or a list of split and path."""
    entries = said if isinstance(said, list) else [said]
    if all(isinstance(e, str) for e in entries):
        entries = [{"split": "train", "path": entries}]
    every = {f.relative_to(folder).as_posix(): f for f in data_files.find_files(folder)}
    found: dict[str, list[Path]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "path" not in entry:
            continue
        paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
        hits = [
            f for name, f in every.items() if any(fnmatch.fnmatchcase(name, str(p)) for p in paths)
        ]
        if hits:
            found.setdefault(str(entry.get("split", "train")), []).extend(hits)
    return found


def _by_name(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names, or else their folders' names, say."""
    info = folder / "dataset_info.json"  # in datasets' own cache it names the splits
    splits = _json(info).get("splits") if info.is_file() else None
    found: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(folder)
        names = [inside.name.partition(".")[0], *reversed(inside.parts[:-1])]
        said = filter(
            None, (_split_in(n, splits if isinstance(splits, dict) else ()) for n in names)
        )
        found.setdefault(next(said, ""), []).append(file)
    rest = found.pop("", [])
    if rest and found:
        raise DataError(
            f"{folder}: some files say of which split they are ({_names(found)}), others do not "
            f"({rest[0].name}); name those to read by a glob"
        )
    return {"train": rest} if rest else found


def _split_in(name: str, splits: Iterable[str]) -> str:
    """The split that a name without its suffix says; an empty text: none."""
    if part := re.search(r"(?:^|-)(\w+)-\d{5}-of-\d{5}$", name):
        return part[1]
    if told := next((s for s in splits if name == s or name.endswith(f"-{s}")), ""):
        return told
    pieces = reversed(re.split(r"[^a-z]+", name.lower()))
    return next((s for p in pieces for s, words in _WORDS.items() if p in words), "")
