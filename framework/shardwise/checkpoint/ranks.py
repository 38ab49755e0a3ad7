"""How ranks agree: JSON as uint8 tensors over gloo, and one verdict for all.

Without torch.distributed every function works for a world of one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from shardwise.checkpoint.manifest import (
    DamagedError,
    MismatchError,
    NonFiniteError,
    PeerLostError,
)
from shardwise.errors import CheckpointError
from shardwise.parallel.mesh import timeout

_KINDS: dict[str, type[CheckpointError]] = {
    c.__name__: c for c in (CheckpointError, DamagedError, MismatchError, NonFiniteError)
}
_created: dict[str, tuple[Any, dist.ProcessGroup]] = {}


class Ranks:
    """The ranks that save or load together, over a group whose backend moves CPU tensors."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        alone = not (dist.is_available() and dist.is_initialized())
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)
        if self.rank < 0:
            raise CheckpointError("this rank is not in the group that saves or loads")

    @classmethod
    def of(cls, group: dist.ProcessGroup | None, *, background: bool = False) -> Ranks:
        """The ranks of ``group``; by default all, over a gloo group made once a process.

        Making it is a collective call. ``background`` gives a group that nothing else uses, for
        a thread that communicates while the main thread does.
        """
        if group is not None or not (dist.is_available() and dist.is_initialized()):
            return cls(group)
        if not background and dist.get_backend() == "gloo":
            return cls(None)
        key = "background" if background else "foreground"
        world = dist.group.WORLD
        if key not in _created or _created[key][0] is not world:
            _created[key] = (world, dist.new_group(backend="gloo", timeout=timeout()))
        return cls(_created[key][1])

    def exchange(self, value: Any) -> list[Any]:
        """The small JSON ``value`` of every rank, by rank, on every rank."""
        if self.size == 1:
            return [value]
        data = _encode(value)
        try:
            lengths = self._lengths(len(data))
            gathered = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
            dist.all_gather(gathered, _padded(data, max(lengths)), group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [_decode(part, n) for part, n in zip(gathered, lengths)]

    def collect(self, value: Any) -> list[Any]:
        """The JSON ``value`` of every rank on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        data = _encode(value)
        try:
            lengths = self._lengths(len(data))
            parts = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
            here = parts if self.rank == 0 else None
            dist.gather(_padded(data, max(lengths)), here, group=self.group, group_dst=0)
        except RuntimeError as error:
            raise self._lost(error) from error
        return [_decode(part, n) for part, n in zip(parts, lengths)] if self.rank == 0 else []

    def deal(self, values: Sequence[Any]) -> Any:
        """Rank 0 gives ``values[r]`` to each rank r; the others pass anything."""
        if self.size == 1:
            return values[0]
        parts = [_encode(v) for v in values] if self.rank == 0 else []
        try:
            sizes = torch.tensor([len(p) for p in parts] or [0] * self.size)
            dist.broadcast(sizes, group=self.group, group_src=0)
            longest = int(sizes.max())
            received = torch.empty(longest, dtype=torch.uint8)
            sent = [_padded(p, longest) for p in parts] or None
            dist.scatter(received, sent, group=self.group, group_src=0)
        except RuntimeError as error:
            raise self._lost(error) from error
        return _decode(received, int(sizes[self.rank]))

    def share(self, value: Any = None) -> Any:
        """The JSON ``value`` of rank 0, on every rank."""
        return self.exchange(value if self.rank == 0 else None)[0]

    def agree(self, error: Exception | None = None) -> None:
        """If any rank has an error, raise it on all; the lowest such rank names the cause."""
        note = None
        if error is not None:
            kind = type(error).__name__
            text = str(error) if isinstance(error, CheckpointError) else f"{kind}: {error}"
            note = [kind, text]
        failed = [(rank, n) for rank, n in enumerate(self.exchange(note)) if n is not None]
        if failed:
            self._fail(failed, error)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run the body; if it fails on any rank, fail on all of them with the cause."""
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        self.agree(error)

    def _lengths(self, own: int) -> list[int]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([own]), group=self.group)
        return [int(n) for n in lengths]

    def _lost(self, error: Exception) -> PeerLostError:
        return PeerLostError(f"rank {self.rank}: lost contact with another rank ({error})")

    def _fail(self, failed: list[tuple[int, list[str]]], own: Exception | None) -> NoReturn:
        rank, (kind, text) = failed[0]
        others = f" (also ranks {', '.join(str(r) for r, _ in failed[1:])})" if failed[1:] else ""
        place = f"rank {rank}{others}: " if self.size > 1 else ""
        raise _KINDS.get(kind, CheckpointError)(f"{place}{text}") from own


def _encode(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor, length: int) -> Any:
    return json.loads(bytes(data[:length].numpy()))


def _padded(data: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(data, (0, length - len(data)))
