"""An adapted model's weights as those of a plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.targets import MARK, Target, is_adapter
from shardwise.errors import CheckpointError


@torch.no_grad()
def merged(
    weight: Tensor, parts: Mapping[str, Tensor], target: Target, config: LowRankConfig
) -> Tensor:
    """A weight with its adapter in it (in its own dtype); ``parts``: A, B and so on, whole.

    The update is computed in fp32 at least. Adapter and weight say the same as before: whoever
    wants them apart again keeps the weight, since subtracting does not give it back bit by bit.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = parts["A"].to(wide), parts["B"].to(wide)
    update = b @ a
    if "A0" in parts:
        update = update - parts["B0"].to(wide) @ parts["A0"].to(wide)
    update = config.of(target.path).scaling * update
    result = weight.to(wide) + (update.T if target.embeds else update)
    if "magnitude" in parts:
        norm = torch.linalg.vector_norm(result, dim=1, keepdim=True)
        result = parts["magnitude"].to(wide)[:, None] / norm * result
    return result.to(weight.dtype)


def merge(
    named: Iterable[tuple[str, Tensor]], targets: Iterable[Target], config: LowRankConfig
) -> Iterator[tuple[str, Tensor]]:
    """A stream of an adapted model's parameters (ours) as that of the plain model's.

    A module's adapter must come behind its weight and before another module's; one weight is held
    at a time. Raises CheckpointError for a weight whose adapter does not come.
    """
    by_weight = {f"{t.path}.weight": t for t in targets}
    names = part_names(config)
    waiting: tuple[str, Tensor, Target] | None = None
    parts: dict[str, Tensor] = {}
    for name, value in named:
        if not is_adapter(name):
            if name in by_weight:
                _all_came(waiting)
                waiting, parts = (name, value, by_weight[name]), {}
            else:
                yield name, value
            continue
        path, _, part = name.rpartition(f".{MARK}.")
        if waiting is None or waiting[2].path != path:
            raise CheckpointError(f"{name}: an adapter of a weight that did not come before it")
        parts[part] = value
        if parts.keys() >= (names - {"magnitude"} if waiting[2].embeds else names):
            yield waiting[0], merged(waiting[1], parts, waiting[2], config)
            waiting = None
    _all_came(waiting)


def part_names(config: LowRankConfig) -> frozenset[str]:
    """What an adapted linear layer has, by the last part of a name."""
    found = {"A", "B"} | ({"magnitude"} if config.magnitudes else set())
    return frozenset(found | ({"A0", "B0"} if config.init == "pissa" else set()))


def _all_came(waiting: tuple[str, Tensor, Target] | None) -> None:
    if waiting is not None:
        raise CheckpointError(f"{waiting[0]}: its adapter did not come, or not all of it")


@torch.no_grad()
def merge_in_place(
    parameters: Mapping[str, Tensor], targets: Iterable[Target], config: LowRankConfig
) -> Callable[[], None]:
    """Put an adapter into the weights that it stands beside; returns what takes it out again.

    ``parameters``: whole tensors by our names, the adapter's among them. What is taken out leaves
    the weights as they were, bit by bit, because they are kept.
    """
    kept: dict[str, Tensor] = {}
    for target in targets:
        name, prefix = f"{target.path}.weight", f"{target.path}.{MARK}."
        parts = {n.removeprefix(prefix): t for n, t in parameters.items() if n.startswith(prefix)}
        kept[name] = parameters[name].clone()
        parameters[name].copy_(merged(kept[name], parts, target, config))

    @torch.no_grad()
    def take_out() -> None:
        for name, weight in kept.items():
            parameters[name].copy_(weight)

    return take_out
