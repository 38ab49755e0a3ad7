"""Models and datasets by their names on the Hugging Face hub: ``hf:org/name[@revision][/path]``.

A name stands wherever a path may. The library huggingface_hub finds it: in its own cache
(``HF_HOME``), or over the network unless ``HF_HUB_OFFLINE`` is set, with its own log-in. Only files
that we read are fetched: no pickles, no code. A name without a revision is the newest one of
``main``; which commit that was, `revision_of` says, and within a process it does not change.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from shardwise.errors import UserError

Kind = Literal["model", "dataset"]
PREFIX = "hf:"
_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^@/]+))?(?:/(?P<inside>[^@]+))?", re.ASCII
)
_FILES: dict[Kind, tuple[str, ...]] = {
    # As `models.weight_files` and `models.travel` read them.
    "model": (
        "config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json",
        "model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors",
        "adapter_model.safetensors", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.json",
        "tokenizer.model", "tokenizer.model.v*", "tiktoken.model", "*.tiktoken", "tekken.json",
        "spiece.model", "spm.model", "sentencepiece.bpe.model", "vocab.json", "encoder.json",
        "vocab.txt", "vocab.bpe", "merges.txt",
    ),
    "dataset": tuple(
        f"*.{ending}{packed}"
        for ending in ("jsonl", "json", "txt", "md", "csv", "parquet", "arrow")
        for packed in ("", ".gz", ".zst", ".xz", ".bz2")
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HubName:
    """``hf:repo@revision/inside``, taken apart."""

    repo: str
    revision: str | None
    inside: str | None


def is_hub_name(ref: Path | str) -> bool:
    """Whether ``ref`` names something on the hub, and no path of this machine."""
    return os.fspath(ref).startswith(PREFIX)


def parse(ref: Path | str) -> HubName:
    """A hub name's parts; raises UserError for what can be none."""
    text = os.fspath(ref)
    found = _NAME.fullmatch(text)
    if found is None or ".." in (found["inside"] or "").split("/"):
        raise UserError(
            f"{text}: is no name on the hub; write hf:org/name, with @revision behind it for "
            "another than the newest, and /path for a part of it ('/' in a revision: %2F)"
        )
    revision = found["revision"]
    return HubName(found["repo"], revision and unquote(revision), found["inside"])


def local_folder(ref: Path | str, kind: Kind) -> Path:
    """Where the files lie that ``ref`` names: a path is itself, a hub name is fetched if need be.

    Of a name with a part behind it, that file or folder. Raises UserError that says why a name
    cannot be had, and the mend.
    """
    if not is_hub_name(ref):
        return Path(ref)
    name = parse(ref)
    place = _snapshot(os.fspath(ref), name, kind)
    if name.inside and not (place / name.inside).exists():
        raise UserError(f"{ref}: {name.repo} has no {name.inside} that we read")
    return place / name.inside if name.inside else place


def revision_of(ref: Path | str, kind: Kind) -> str | None:
    """The commit (a hash) that a hub name stands for in this process; None of a path."""
    if not is_hub_name(ref):
        return None
    return _snapshot(os.fspath(ref), parse(ref), kind).name


def pinned(ref: Path | str, kind: Kind) -> str:
    """``ref`` with its commit in place of a branch or of nothing; a path as it is."""
    commit = revision_of(ref, kind)
    if commit is None:
        return os.fspath(ref)
    name = parse(ref)
    return f"{PREFIX}{name.repo}@{commit}" + (f"/{name.inside}" if name.inside else "")


@functools.cache
def _snapshot(ref: str, name: HubName, kind: Kind) -> Path:
    """The folder of the commit, in the library's cache."""
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError:
        raise UserError(
            f"{ref}: names on the hub need huggingface_hub: pip install 'shardwise[hf]'"
        ) from None
    inside = f"{name.inside}/" if name.inside else ""
    patterns = [f"{inside}{pattern}" for pattern in _FILES[kind]]
    if name.inside and kind == "model":  # a tokenizer's file is nothing without those beside it
        above = name.inside.rpartition("/")[0]
        patterns += [f"{above}/{p}" if above else p for p in _FILES[kind] if "safetensors" not in p]
    cache = f"the cache ({constants.HF_HUB_CACHE})"
    fetch = f"hf download {name.repo}" + (" --repo-type dataset" if kind == "dataset" else "")
    try:
        found = snapshot_download(
            name.repo,
            repo_type=kind,
            revision=name.revision,
            allow_patterns=patterns + ([name.inside] if name.inside else []),
        )
    except errors.LocalEntryNotFoundError as error:
        part = isinstance(error, getattr(errors, "IncompleteSnapshotError", ()))
        there = f"only a part of it is in {cache}" if part else f"it is not in {cache}"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE forbids to fetch it; unset that, or fetch it first"
        else:
            why = f"{constants.ENDPOINT} cannot be reached ({_cause(error)}); fetch it where it can"
        raise UserError(f"{ref}: {there}, and {why}: {fetch}") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{ref}: its owner lets in who has accepted the terms at "
            f"{constants.ENDPOINT}/{name.repo}, and is logged in (hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{ref}: {constants.ENDPOINT} has no {kind} of this name that you may see; is it "
            "spelt so, or private (hf auth login)?"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{ref}: {name.repo} has no revision {name.revision or 'main'}") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"{ref}: cannot be fetched: {_line(error)}") from error
    return Path(found)


def _cause(error: BaseException) -> str:
    return _line(error.__cause__ or error)


def _line(error: BaseException) -> str:
    return f"{error}".strip().partition("\n")[0] or type(error).__name__
