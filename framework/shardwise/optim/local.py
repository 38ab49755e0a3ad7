"""An update of each rank's own memory, past DTensor's dispatch.

What torch's optimizers compute is elementwise, so the parts of a parameter are updated as
parameters of their own. DTensor comes to the same end, but works out the placements of all tensors
together first: that is most of what a short run on new shapes costs, and some of every update.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

_ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


@torch.no_grad()
def local_step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()``; of elementwise kinds on the local parts of what are DTensors."""
    if type(optimizer) not in _ELEMENTWISE:
        optimizer.step()
        return
    groups, state = optimizer.param_groups, optimizer.state
    own = {p: _own(p) for g in groups for p in g["params"] if p.grad is not None}
    try:
        optimizer.param_groups = [
            {**g, "params": [own[p] for p in g["params"] if p in own]} for g in groups
        ]
        optimizer.state = defaultdict(
            dict, {own[p]: {key: _local(x) for key, x in state[p].items()} for p in own}
        )
        optimizer.step()
    finally:
        optimizer.param_groups, optimizer.state = groups, state


def _own(param: Parameter) -> Parameter:
    """The part of a parameter and its gradient that this rank holds; the same memory."""
    if not isinstance(param, DTensor):
        return param
    own = Parameter(_local(param))
    own.grad = _local(param.grad)
    return own


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value
