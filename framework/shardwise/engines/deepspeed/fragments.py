"""Where DeepSpeed keeps this rank's part of each master weight, moment and gradient.

ZeRO flattens parameters of a group into one tensor and deals that out in equal stretches (stages 1
and 2), or deals out each parameter by itself (stage 3). Either way a rank has a stretch
of a parameter's elements, in row-major order, and it lies in a flat tensor of the library's that
torch's optimizer knows as a parameter. Without ZeRO, which is fp32 alone, a parameter is its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.engines.deepspeed.swapped import Swapped
from shardwise.ops.flat_shard import FlatShard


@dataclasses.dataclass(frozen=True)
class Fragment:
    """A stretch of a parameter: ``count`` elements from ``start``, in ``flat`` from ``offset``.

    ``flat``: what the optimizer updates. None: this rank has none of the parameter.
    """

    parameter: nn.Parameter
    flat: Tensor | None
    offset: int
    start: int
    count: int

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        shape: torch.Size = getattr(self.parameter, "ds_shape", self.parameter.shape)
        return shape

    @property
    def is_whole(self) -> bool:
        """Whether the optimizer updates the parameter itself."""
        return self.flat is self.parameter

    def part(self, flat: Tensor) -> Tensor:
        """The stretch of a flat tensor such as the optimizer's own, live."""
        if self.is_whole:
            return flat.detach()
        return self.of(flat.detach().view(-1)[self.offset : self.offset + self.count])

    def of(self, local: Tensor) -> FlatShard:
        """This rank's elements as a part of the parameter."""
        return FlatShard(local, self.shape, self.start)

    def nothing(self, dtype: torch.dtype) -> Tensor:
        """Where there is no element here; zeros of a parameter that is whole."""
        if self.is_whole:
            return torch.zeros_like(self.parameter.data, dtype=dtype)
        return self.of(torch.zeros(self.count, dtype=dtype, device=self.parameter.device))


def find(engine: Any, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Fragment]:
    """This rank's fragments of all trained parameters of a DeepSpeed engine, by name."""
    optimizer = engine.optimizer
    found = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):  # stage 3
            found[name] = _of_parameter(optimizer, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            found[name] = _of_group(parameter, masters(optimizer))
        else:
            found[name] = Fragment(parameter, parameter, 0, 0, parameter.numel())
    return found


def masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 tensors of each group, or sub-group, of this rank."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 in fp32, 2
        "fp32_groups_flat_partition",  # stage 1 in bf16
    ):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return []


def _of_group(parameter: Any, flats: list[Tensor]) -> Fragment:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(parameter, None, 0, 0, 0)
    own, flat = mapping.lp_fragment_address, flats[mapping.param_group_index]
    return Fragment(parameter, flat, mapping.hp_fragment_address.start, own.start, own.numel)


def _of_parameter(optimizer: Any, parameter: Any) -> Fragment:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * optimizer._get_param_partition_rank(parameter)
    count = max(0, min(size, parameter.ds_numel - start))  # the last ranks' are filled up
    if not count:
        return Fragment(parameter, None, 0, 0, 0)
    return Fragment(parameter, optimizer.fp32_partitioned_groups_flat[group], offset, start, count)


def gradient(optimizer: Any, fragment: Fragment) -> Tensor | None:
    """The reduced gradient's part between the last backward pass and the step, live.

    None: there is none, because nothing depended on the parameter.
    """
    parameter: Any = fragment.parameter
    if fragment.is_whole:
        return None if parameter.grad is None else parameter.grad.detach()
    if hasattr(optimizer, "fp32_groups_gradients"):  # stage 1 in bf16: whole on every rank
        kept = getattr(parameter, "_hp_grad", None)
        return None if kept is None else kept.detach().view(fragment.shape)
    if fragment.flat is None:
        return None
    if hasattr(parameter, "ds_id"):
        whole, _ = optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=True)
        return fragment.of(whole.detach().view(-1)[: fragment.count])
    mapping = parameter._hp_mapping
    table = mapping.offload_gradient_dict if mapping.use_offload else mapping.gradient_dict
    group = table.get(mapping.param_group_index)
    if group is None:
        return None
    return fragment.of(group[parameter._index_in_param_group].detach().view(-1))


def frozen(parameter: Any) -> Tensor:
    """What is here of a parameter that is not trained, live."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()  # type: ignore[no-any-return]
    return _computes(parameter)


def copy_of(fragment: Fragment) -> Tensor | None:
    """What computes in the place of a fragment's master; None: the master itself does."""
    if fragment.is_whole or fragment.flat is None:
        return None
    if hasattr(fragment.parameter, "ds_id"):
        return _computes(fragment.parameter)
    flat = fragment.parameter.detach().view(-1)
    return fragment.of(flat[fragment.start : fragment.start + fragment.count])


def _computes(parameter: Any) -> FlatShard:
    """A parameter's own part under stage 3; a copy, where it lies on NVMe."""
    stored = parameter.ds_tensor
    away = getattr(getattr(stored, "status", None), "name", "") == "NOT_AVAILABLE"
    if away:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    part = stored.detach().view(-1)
    if away:
        part = part.clone()
        parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])
    start = dist.get_rank(parameter.ds_process_group) * len(part)
    count = max(0, min(len(part), parameter.ds_numel - start))
    return FlatShard(part[:count], parameter.ds_shape, start if count else 0)


def refresh(engine: Any, swapped: Swapped) -> None:
    """Give the parameters that compute what their masters are; a collective call."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3, as its own step does
        optimizer._partition_all_parameters()
        for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            with swapped.resident(master, write=False):
                flat = optimizer.fp16_partitioned_groups_flat[group]
                if flat is None:  # on NVMe, all of the group or some
                    optimizer._partitioned_params_swap_out(group)
                    continue
                flat.data.copy_(master.data)
                optimizer._unflatten_partitioned_parameters(group)
        if kept := optimizer.persistent_parameters:  # small ones stay gathered
            kept[0].all_gather(kept)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
