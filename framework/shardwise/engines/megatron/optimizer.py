"""Megatron's own optimizer, read and written by our names.

It reduces, clips and updates: with ZeRO its distributed optimizer, which gives every data rank
stretches of Megatron's flattened parameters, else the one that keeps whole masters on every rank.
`Master` finds a tensor of ours in what it keeps: the part of a stretch that is ours, as regions of
the global tensor. Nothing is copied.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core import optimizer as library
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from shardwise.config.optimizers import AdamWConfig, MomentsConfig, OptimizerConfig, SgdConfig
from shardwise.engines.megatron import names
from shardwise.ops.flat_shard import flat_regions
from shardwise.ops.region_shards import RegionShards
from shardwise.ops.regions import Region
from shardwise.optim.build import set_lr
from shardwise.optim.torch_kinds import ensure_state
from shardwise.parallel.full_tensor import chunk_size
from shardwise.parallel.mesh import Mesh
from shardwise.precision.policy import Precision


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What this rank updates of a parameter: its elements from ``start`` on, flattened."""

    main: Tensor  # what the inner optimizer updates
    start: int
    stop: int


def is_distributed(mesh: Mesh) -> bool:
    """Whether states are dealt out over data (and context) ranks."""
    return mesh.groups["shard"].size() > 1


class CoreOptimizer:
    """Of all parts of a model on this rank, whose weights may be anything yet."""

    def __init__(
        self,
        config: OptimizerConfig,
        clip: float,
        parts: Sequence[Any],
        where: Mapping[str, names.Place],
        mesh: Mesh,
        precision: Precision,
        groups: ProcessGroupCollection,
    ) -> None:
        self.parts, self.clip, self.distributed = parts, clip, is_distributed(mesh)
        settings = _settings(config, clip, precision, distributed=self.distributed)
        groups.mp = groups.tp_ep_pp = mesh.groups["unique"]
        groups.intra_dist_opt = mesh.groups["all"]
        chain = library.get_megatron_optimizer(
            settings,
            list(parts),
            _groups(config, where),
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        [self.outer] = chain.chained_optimizers  # another one would be of experts
        self.stretches = dict(_stretches(self.outer))
        self.counters: dict[int, _Counter] = {}  # by id of a group
        if self.inner is not None:
            self.counters = _start_state(self.inner)

    @property
    def inner(self) -> Any:
        """What updates: PyTorch's optimizer, Transformer Engine's or apex'; None: nothing is."""
        return self.outer.optimizer

    def step(self, lr: float, loss_scale: float) -> float:
        """Clip and update; the norm, which is not finite where every rank skipped the update."""
        outer = self.outer
        if loss_scale != 1.0:
            outer.get_loss_scale().fill_(loss_scale)
        overflows = outer.prepare_grads()
        if overflows:
            norm = math.inf
        else:
            # Not its `step`: of bf16 and fp32 that applies a NaN.
            norm = outer.clip_grad_norm(self.clip) if self.clip > 0 else outer.get_grad_norm()
        norm = float(norm)
        if math.isfinite(norm):
            set_lr(outer, lr)
            outer.step_with_ready_grads()
        outer.zero_grad()
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Make what computes what the masters are: what an update does behind it."""
        if hasattr(self.outer, "_copy_main_params_to_model_params"):
            self.outer._copy_main_params_to_model_params()
        for part in self.parts if self.distributed else ():
            part.start_param_sync()

    def written(self) -> list[int]:
        """Counters of writes into the masters."""
        return [stretch.main._version for stretch in self.stretches.values()]

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the inner optimizer keeps of a parameter's stretch."""
        stretch = self.stretches.get(parameter)
        return {} if stretch is None else self.inner.state[stretch.main]

    def tensors_of(self, parameter: nn.Parameter) -> dict[str, Tensor | None]:
        """By kind, what an update depends on: None for what has the parameter's elements.

        ``step`` is a scalar; fused optimizers count by group, in numbers, and `follow` what is
        written into it.
        """
        state = self.state_of(parameter)
        found = {kind: None if value.dim() else value for kind, value in state.items()}
        if state and self.counters and "step" not in state:
            main = self.stretches[parameter].main
            [group] = [g for g in self.inner.param_groups if any(m is main for m in g["params"])]
            found["step"] = self.counters[id(group)].told()
        return dict(sorted(found.items()))

    def follow(self) -> None:
        """What was written into the masters and counters."""
        for counter in self.counters.values():
            counter.follow()
        self.refresh()


def _settings(
    config: OptimizerConfig, clip: float, precision: Precision, *, distributed: bool
) -> library.OptimizerConfig:
    dtype = precision.compute
    own: dict[str, Any] = {}
    if isinstance(config, MomentsConfig):
        own = {
            "adam_beta1": config.beta1,
            "adam_beta2": config.beta2,
            "adam_eps": config.eps,
            "decoupled_weight_decay": config.kind == "adamw",
        }
    elif isinstance(config, SgdConfig):
        own = {"sgd_momentum": config.momentum}
    if precision.loss_scaling:
        own["loss_scale"] = 1.0  # ours is set at every step
    return library.OptimizerConfig(
        optimizer="adam" if isinstance(config, AdamWConfig) else "sgd",
        lr=config.lr,
        weight_decay=config.weight_decay,
        clip_grad=clip,
        use_distributed_optimizer=distributed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
        **own,
    )


def _groups(
    config: OptimizerConfig, where: Mapping[str, names.Place]
) -> dict[library.ParamKey, Any]:
    """Rates and decays by name; what is fused has one, see `refusals`."""
    found: dict[tuple[float, float], set[int]] = {}
    for name, place in where.items():
        key = (config.lr_scale_of(name), config.decay_of(name))
        found.setdefault(key, set()).add(id(place.parameter))
    return {
        _key(f"lr_scale {scale} decay {decay}", members): {"lr_scale": scale, "weight_decay": decay}
        for (scale, decay), members in found.items()
    }


def _key(name: str, members: set[int]) -> library.ParamKey:
    among = library.ParamPredicate(name, lambda parameter: id(parameter) in members)
    return library.ParamKey(predicate=among)


def _stretches(outer: Any) -> Iterator[tuple[nn.Parameter, Stretch]]:
    """By Megatron's parameters, what this rank updates of them."""
    if hasattr(outer, "shard_fp32_groups"):
        for models, mains in (
            (outer.model_float16_groups, outer.shard_fp32_from_float16_groups),
            (outer.model_fp32_groups, outer.shard_fp32_groups),
        ):
            for parameter, main in _pairs(models, mains):
                own = outer._get_model_param_range_map(parameter)["param"]
                yield parameter, Stretch(main, own.start, own.end)
        return
    if hasattr(outer, "float16_groups"):
        pairs = [
            *_pairs(outer.float16_groups, outer.fp32_from_float16_groups),
            *_pairs(outer.fp32_from_fp32_groups, outer.fp32_from_fp32_groups),
        ]
    else:
        held = outer.get_parameters()
        pairs = list(zip(held, held, strict=True))
    for parameter, main in pairs:
        yield parameter, Stretch(main, 0, main.numel())


def _pairs(models: Any, mains: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for some, others in zip(models, mains, strict=True):
        yield from zip(some, others, strict=True)


class _Counter:
    """Of a group of a fused optimizer, which counts updates in a number of the group's."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.group, self.value = group, torch.zeros(())
        self.version = self.value._version

    def told(self) -> Tensor:
        """The number of now, as a tensor to save or to write into."""
        self.value.fill_(float(self.group.get("step", 0)))
        self.version = self.value._version
        return self.value

    def follow(self) -> None:
        """Count on from what was written."""
        if self.value._version != self.version:
            self.group["step"], self.version = int(self.value), self.value._version


def _start_state(inner: Any) -> dict[int, _Counter]:
    """As zeros, what the first update would create, see `optim.build`; counters beside it."""
    if isinstance(inner, (torch.optim.Adam, torch.optim.SGD)):
        ensure_state(inner)
        return {}
    momentum = inner.defaults.get("momentum")
    kinds = ("exp_avg", "exp_avg_sq") if momentum is None else ("momentum_buffer",) * (momentum > 0)
    for group in inner.param_groups:
        for main in group["params"]:
            inner.state[main] |= {kind: torch.zeros_like(main.detach()) for kind in kinds}
    return {id(g): _Counter(g) for g in inner.param_groups} if momentum is None else {}


class Master:
    """One of our tensors in what the optimizer keeps on this rank; where native has a parameter."""

    requires_grad = True

    def __init__(
        self, place: names.Place, shape: torch.Size, optimizer: CoreOptimizer, mesh: Mesh
    ) -> None:
        self.place, self.shape, self.optimizer = place, shape, optimizer
        self.cut = names.cut_dim(place, shape, mesh)
        self.part, self.origin = list(shape), [0] * len(shape)
        if self.cut is not None:
            whole, tp, rank = shape[self.cut], mesh.layout.tp, mesh.place["tp"]
            self.part[self.cut] = chunk_size(whole, tp, rank)
            self.origin[self.cut] = -(-whole // tp) * rank
        self.runs = list(names.runs(place))

    @property
    def data(self) -> RegionShards:
        """The weight."""
        return self.of("weights")

    @property
    def grad(self) -> RegionShards:
        """The gradient, where the part of Megatron's buffer is that this rank has reduced."""
        return self.of("grads")

    def of(self, kind: str) -> RegionShards:
        """This rank's part of a kind of tensor, live; ``copies``: of what computes."""
        parameter = self.place.parameter
        stretch = self.optimizer.stretches.get(parameter)
        if stretch is None:
            return RegionShards([], self.shape, self._like(kind), self.cut)
        start, stop = stretch.start, stretch.stop
        if kind == "weights":
            flat = stretch.main.detach().view(-1)
        elif kind in ("grads", "copies"):
            whole: Tensor = parameter.main_grad if kind == "grads" else parameter  # type: ignore[attr-defined]
            flat = whole.detach().view(-1)[start:stop]
        else:
            flat = self.optimizer.state_of(parameter)[kind].view(-1)
        return RegionShards(list(self._regions(flat, start, stop)), self.shape, flat, self.cut)

    def _like(self, kind: str) -> Tensor:
        computes = self.place.parameter.detach()
        wide = kind != "copies" and computes.dtype.itemsize == 2
        return computes.new_empty(0, dtype=torch.float32 if wide else computes.dtype)

    def _regions(self, flat: Tensor, start: int, stop: int) -> Iterator[tuple[Region, Tensor]]:
        for ours, at, length in self.runs:
            low, high = max(at, start), min(at + length, stop)
            if low >= high:
                continue
            piece, first = flat[low - start : high - start], ours + low - at
            for (offset, shape), begin in flat_regions(self.part, first, first + high - low):
                view = piece[begin - first : begin - first + math.prod(shape)].view(shape)
                place = tuple(o + p for o, p in zip(offset, self.origin, strict=True))
                yield Region(place, shape), view
