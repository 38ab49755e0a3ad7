"""Our parameter names against Hugging Face's: rules as data, applied to streams of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shardwise.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a Hugging Face checkpoint and our parameters that it holds.

    Several of ours are concatenated, in order, along their first dimension, with ``rows`` of each;
    ``heads``: of each, so many parts stand in turn (GPT-NeoX: queries, keys and values of a head).
    ``transpose`` then swaps the two dimensions (GPT-2 stores linear weights as (in, out)).
    """

    hf: str
    ours: tuple[str, ...]
    rows: tuple[int, ...] = ()  # of each, where there are several
    transpose: bool = False
    heads: int | None = None

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Ours to theirs."""
        whole = self.in_turn(parts[0] if len(parts) == 1 else torch.cat(tuple(parts)))
        return whole.t().contiguous() if self.transpose else whole

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Theirs to ours."""
        whole = tensor.t() if self.transpose else tensor
        if len(self.ours) == 1:
            yield self.ours[0], whole.contiguous()
            return
        if whole.shape[0] != sum(self.rows):
            raise CheckpointError(
                f"{self.hf}: {whole.shape[0]} rows, and by the config it has {sum(self.rows)}"
            )
        parts = self.apart(whole).split(self.rows)
        yield from zip(self.ours, (t.contiguous() for t in parts))

    def in_turn(self, rows: Tensor) -> Tensor:
        """Rows of ours, one above the other, in the order of theirs."""
        return rows if self.heads is None else _swapped(rows, len(self.ours), self.heads)

    def apart(self, rows: Tensor) -> Tensor:
        """Rows of theirs in the order of ours."""
        return rows if self.heads is None else _swapped(rows, self.heads, len(self.ours))


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    parts: Tensor = rows.unflatten(0, (outer, inner, -1))
    return parts.transpose(0, 1).flatten(0, 2)


def to_hf_stream(
    rules: Iterable[Rule], named: Iterable[tuple[str, Tensor]], ignore: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Rename and join a stream of our tensors; each is passed on as soon as it is whole.

    ``ignore`` are names of ours that have no tensor of their own there (a tied head). Raises
    CheckpointError for an unknown or a missing name.
    """
    rule_of = {name: rule for rule in rules for name in rule.ours}
    waiting = dict(rule_of)
    parts: dict[str, Tensor] = {}
    for name, tensor in named:
        if name in ignore:
            continue
        if name not in rule_of:
            raise CheckpointError(f"parameter {name!r} has no place in a Hugging Face checkpoint")
        parts[name] = tensor
        del waiting[name]
        rule = rule_of[name]
        if all(part in parts for part in rule.ours):
            yield rule.hf, rule.join([parts.pop(part) for part in rule.ours])
    if waiting:
        raise CheckpointError(f"parameters missing from the export: {_some(waiting)}")


def from_hf_stream(
    rules: Iterable[Rule],
    named: Iterable[tuple[str, Tensor]],
    prefix: str,
    ignore: Iterable[str] = (),
) -> Iterator[tuple[str, Tensor]]:
    """Rename and split a stream of their tensors.

    ``prefix`` ("model.") may be absent from all names, as in checkpoints of the bare decoder.
    ``ignore`` are endings of names that carry no weights of ours. Raises CheckpointError for an
    unknown or a missing name.
    """
    waiting = {rule.hf: rule for rule in rules}
    known = set(waiting)
    for name, tensor in named:
        full = name if name in known else prefix + name
        if full in known:
            if full not in waiting:
                raise CheckpointError(f"tensor {full!r} is stored twice, with prefix and without")
            yield from waiting.pop(full).split(tensor)
        elif not name.endswith(tuple(ignore)):
            raise CheckpointError(
                f"tensor {name!r} is not part of this model family; is config.json of another "
                "model?"
            )
    if waiting:
        raise CheckpointError(f"tensors missing from the checkpoint: {_some(waiting)}")


def _some(names: Iterable[str]) -> str:
    """At most five names, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
    return ", ".join(listed[:5]) + more
