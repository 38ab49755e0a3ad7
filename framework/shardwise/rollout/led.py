"""Rollout engines that the first of several ranks leads, where requests come to one rank alone.

The ranks that share a generator make the same calls in the same order (`rollout.sharded`). Stages
do so by themselves. A server hears its clients on one rank: its engines are `Leader`s, which tell
every call to the other ranks before they make it, and those `follow`. What travels is JSON, and
tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import ShardwiseError, UserError
from shardwise.parallel.collectives import broadcast_bytes
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import Progress, RolloutCounts, RolloutEngine
from shardwise.rollout.sequences import Request

Stream = Generator[tuple[str, Tensor], None, None]
_END = "end"
_WAITS = timedelta(days=3650)  # for the next call: as long as no client asks


def line() -> dist.ProcessGroup:
    """What calls travel on, between all ranks; a collective call."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=_WAITS)
    return group


class Leader:
    """A `RolloutEngine` of the first rank, whose calls the others make, too.

    Not of several threads at once. An error that is no `ShardwiseError` leaves the ranks out of
    step: ``lost`` is called, and every later call raises BrokenError.
    """

    def __init__(
        self,
        name: str,
        engine: RolloutEngine,
        group: dist.ProcessGroup,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self._engine, self._group, self._lost = name, engine, group, lost
        self.broken = False

    @property
    def checksum(self) -> str:
        """See `RolloutEngine`."""
        return self._engine.checksum

    @property
    def counts(self) -> RolloutCounts:
        """See `RolloutEngine`."""
        return self._engine.counts

    def update_weights(
        self, weights: Iterable[tuple[str, Tensor]], *, hf_names: bool = True
    ) -> str:
        """See `RolloutEngine`: the tensors go to all."""
        return str(self._lead("update_weights", weights=weights, hf_names=hf_names))

    def submit(
        self, request: Request, sampling: Sampling, key: int = 0, **options: Any
    ) -> list[int]:
        """See `RolloutEngine`."""
        return list(self._lead("submit", request=request, sampling=sampling, key=key, **options))

    def fork(
        self, sequence: int, request: Request, sampling: Sampling, key: int = 0, **options: Any
    ) -> list[int]:
        """See `RolloutEngine`."""
        said = {"request": request, "sampling": sampling, "key": key, **options}
        return list(self._lead("fork", sequence=sequence, **said))

    def step(self) -> list[Progress]:
        """See `RolloutEngine`."""
        return list(self._lead("step"))

    def release(self, sequence: int) -> None:
        """See `RolloutEngine`; of ranks out of step, nothing is left to be freed."""
        if not self.broken:
            self._lead("release", sequence=sequence)

    def _lead(self, method: str, **said: Any) -> Any:
        if self.broken:
            raise BrokenError("another rank of this engine is gone")
        try:
            call = {"engine": self.name, "method": method}
            call |= {k: _as_json(v) for k, v in said.items() if k != "weights"}
            _tell(call, self._group)
            with contextlib.ExitStack() as stack:
                if "weights" in said:
                    stream = _sent(said["weights"], self._group)
                    said["weights"] = stack.enter_context(contextlib.closing(stream))
                return getattr(self._engine, method)(**said)
        except ShardwiseError:  # which the others meet as well
            raise
        except BaseException:
            self.broken = True
            self._lost()
            raise


class BrokenError(RuntimeError):
    """The ranks of an engine are out of step: they must be started again."""


def follow(engines: Mapping[str, RolloutEngine], group: dist.ProcessGroup) -> None:
    """Make the calls that the first rank's leaders make, by their names, until `end`.

    Raises RuntimeError when the first rank is gone.
    """
    while (call := json.loads(broadcast_bytes(None, 0, group))) != _END:
        engine, method = engines[call.pop("engine")], call.pop("method")
        if "request" in call:
            call["request"] = Request(**call["request"])
            call["sampling"] = Sampling.model_validate_json(call["sampling"])
        with contextlib.suppress(ShardwiseError), contextlib.ExitStack() as stack:  # 0 says it
            if method == "update_weights":
                call["weights"] = stack.enter_context(contextlib.closing(_received(group)))
            getattr(engine, method)(**call)


def end(group: dist.ProcessGroup) -> None:
    """Have the others return from `follow`."""
    _tell(_END, group)


def _tell(said: Any, group: dist.ProcessGroup) -> None:
    broadcast_bytes(json.dumps(said).encode(), 0, group)


def _as_json(value: Any) -> Any:
    if isinstance(value, Sampling):
        return value.model_dump_json()
    return dataclasses.asdict(value) if isinstance(value, Request) else value


# --- weights ------------------------------------------------------------------------------------


def _sent(weights: Iterable[tuple[str, Tensor]], group: dist.ProcessGroup) -> Stream:
    """The stream, told to the others as it is taken; if it breaks or is left, they hear so."""
    ended = ""
    try:
        for name, tensor in weights:
            dtype = str(tensor.dtype).removeprefix("torch.")
            _tell({"name": name, "shape": list(tensor.shape), "dtype": dtype}, group)
            dist.broadcast(_as_bytes(tensor.cpu().contiguous()), group_src=0, group=group)
            yield name, tensor
        ended = "whole"
    finally:
        _tell({"ended": ended}, group)


def _received(group: dist.ProcessGroup) -> Stream:
    """What `_sent` sends. Raises UserError where it broke; takes what is left when it is closed."""
    taken = False
    try:
        while "name" in (said := json.loads(broadcast_bytes(None, 0, group))):
            dtype = getattr(torch, said["dtype"])
            tensor = torch.empty(said["shape"], dtype=dtype)
            dist.broadcast(_as_bytes(tensor), group_src=0, group=group)
            yield said["name"], tensor
        taken = True
        if not said["ended"]:
            raise UserError("the first rank could not read all of the weights")
    finally:
        if not taken:
            json.loads(broadcast_bytes(None, 0, group))


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
