"""What ``init_from`` says of a model and its tokenizer, so that a recipe need not repeat it.

A recipe that starts from a model folder may leave out ``model``, or say single keys of it: the
others are the folder's. A section that names its ``family`` is whole, and is read as if there were
no folder. ``tokenizer`` left out, or without ``kind`` and ``path``, is the folder's too. What was
read has a `Source` of its own, and the resolved recipe holds all of it.

Which room reads such folders is not this one's business: it registers a `Reader`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardwise import hub
from shardwise.config.paths import expand
from shardwise.config.source import Problem, Source, Tree, places
from shardwise.errors import ShardwiseError, UserError


@dataclasses.dataclass(frozen=True)
class Start:
    """The sections that describe a folder's model; ``tokenizer``: None if it comes without one."""

    model: dict[str, Any]
    tokenizer: dict[str, Any] | None


Reader = Callable[[str], Start]  # of a path or a hub name; raises ShardwiseError
_READERS: list[Reader] = []


def register_start_reader(read: Reader) -> None:
    """Let ``read`` describe the models that recipes start from."""
    _READERS[:] = [read]


def located(ref: Path | str) -> Path:
    """The folder or file that a path or a hub name means; raises UserError if there is none."""
    place = hub.local_folder(expand(ref), "model")
    if not place.exists():
        raise UserError(
            f"{ref} does not exist (from {Path.cwd()}); run the recipe that makes it, or name "
            "another (hf:org/name is one on the hub)"
        )
    return place


def fill(tree: Tree) -> None:
    """Put in what a recipe leaves to ``init_from``; what is wrong with that joins its problems."""
    data, ref = tree.data, tree.data.get("init_from")
    model, tokenizer = data.get("model"), data.get("tokenizer")
    wants_model = model is None or (isinstance(model, dict) and "family" not in model)
    wants_tokenizer = tokenizer is None or (
        isinstance(tokenizer, dict) and not {"kind", "path"} & tokenizer.keys()
    )
    if not isinstance(ref, str) or not _READERS or not (wants_model or wants_tokenizer):
        return
    if not wants_model and not hub.is_hub_name(ref) and not expand(ref).exists():
        return  # said where the run is checked
    try:
        located(ref)
        start = _READERS[0](ref)
        if wants_model and wants_tokenizer and start.tokenizer is None:
            raise UserError(
                f"{ref} comes without a tokenizer that we read; name one: tokenizer.kind file, "
                "tiktoken or sentencepiece and its path, or kind bytes if the model reads those"
            )
    except ShardwiseError as error:
        tree.problems.append(Problem(("init_from",), tree.source(("init_from",)), str(error)))
        return
    source = Source("start", file=ref)
    if wants_model:
        _complete(tree, "model", start.model, source)
    if wants_tokenizer and start.tokenizer is not None:
        _complete(tree, "tokenizer", start.tokenizer, source)


def _complete(tree: Tree, name: str, found: dict[str, Any], source: Source) -> None:
    """The section ``name``, with what was ``found`` where it says nothing."""
    said = tree.data.get(name) or {}
    tree.data[name] = {**found, **said}
    for key in found.keys() - said.keys():
        tree.sources.update(places(found[key], (name, key), source))
    tree.sources.setdefault((name,), source)
