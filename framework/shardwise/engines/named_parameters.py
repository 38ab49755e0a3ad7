"""The parameters of all pipeline stages that a rank holds, by name."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.adapters.quantise import QuantisedWeight, quantised
from shardwise.adapters.targets import is_adapter
from shardwise.adapters.trained import EVERYTHING, Trained, TrainedPart
from shardwise.assemble import Assembled
from shardwise.errors import CheckpointError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.init import place, plain_name
from shardwise.ops import comm
from shardwise.parallel import tensor
from shardwise.parallel.collectives import broadcast_bytes, sum_over
from shardwise.parallel.full_tensor import full_tensor, local_tensor, tp_dim
from shardwise.parallel.layout import V_SHAPED
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import homes, split_model

TIED = "embed.weight"


class NamedParameters:
    """Names, gradients and gathering over tensor, pipeline and data ranks.

    A tied embedding stands at both ends of a pipeline. On two ranks, both copies get the sum of
    both gradients, and stay equal. On one rank (a V), the copy at the end is a ``mirror``: it is
    no parameter of its own, its gradient moves to the original, and its values come from there.
    """

    def __init__(
        self,
        assembled: Assembled,
        config: DecoderConfig,
        mesh: Mesh,
        trained: Trained = EVERYTHING,
    ) -> None:
        self.mesh, self.config, self.partial = mesh, config, assembled.partial
        self.trained = trained
        self.parameters: dict[str, nn.Parameter] = {}
        self.quantised: dict[str, QuantisedWeight] = {}  # what stands where parameters stood
        self.mirror: nn.Parameter | None = None
        for model in assembled.chunks.values():
            self.quantised |= dict(quantised(model))
            for raw_name, parameter in model.named_parameters():
                name = plain_name(raw_name)
                if name in self.parameters:
                    self.mirror = parameter
                else:
                    self.parameters[name] = parameter
        v_shaped = mesh.layout.schedule in V_SHAPED
        ends = mesh.place["pp"] in (0, mesh.layout.pp - 1)
        tied = config.tie_embeddings and mesh.layout.pp > 1 and not v_shaped
        self.shares_tied = tied and ends

    # --- gradients ------------------------------------------------------------------------------

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Sum what no backward pass sums: partial gradients over tp, tied ones over pp."""
        grads = {n: local_tensor(p.grad) for n, p in self.parameters.items() if p.grad is not None}
        tensor.sum_partial([g for n, g in grads.items() if n in self.partial], self.mesh)
        if self.mirror is not None and self.mirror.grad is not None:
            grads[TIED].add_(local_tensor(self.mirror.grad))
            self.mirror.grad = None
        if self.shares_tied and TIED in grads:
            comm.all_reduce(grads[TIED], self.mesh.groups["ends"], "pp")

    def local_gradients(self) -> list[Tensor]:
        """This rank's memory of all gradients."""
        return [local_tensor(p.grad) for p in self.parameters.values() if p.grad is not None]

    def summed_later(self) -> set[str]:
        """Whose gradient is not whole, or not all there, when autograd has added to it."""
        found = {name for name in self.parameters if name in self.partial}
        twice = self.config.tie_embeddings and self.mesh.layout.tp > 1
        return found | ({TIED} if twice and TIED in self.parameters else set())

    def grad_norm(self, gone: Mapping[nn.Parameter, Tensor] | None = None) -> float:
        """2-norm of all gradients, each element once: rows summed in fp64 over all ranks.

        A CPU sums a whole tensor one by one: in fp32, of 30 million elements it lost 0.3%.

        ``gone``: squares (fp64 scalars) of those that are no more.
        """
        counted = [
            local_tensor(p.grad)
            for name, p in self.parameters.items()
            if p.grad is not None and self._counts_here(name, p)
        ]
        local = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        if counted:
            rows = [torch.linalg.vector_norm(grad, dim=-1).reshape(-1) for grad in counted]
            local = torch.cat(rows).double().square().sum()
        for name, p in self.parameters.items():
            if gone and p in gone and self._counts_here(name, p):
                local = local + gone[p]
        return math.sqrt(sum_over(local, self.mesh.groups["unique"]).item())

    def _counts_here(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether this rank's part is nobody else's of its replica."""
        place, layout = self.mesh.place, self.mesh.layout
        if layout.tp > 1 and place["tp"] > 0 and tp_dim(parameter, self.mesh) is None:
            return False
        return not (self.shares_tied and name == TIED and place["pp"] > 0)

    @torch.no_grad()
    def refresh_mirror(self) -> None:
        """Make the copy of a tied embedding what the original is."""
        if self.mirror is not None:
            local_tensor(self.mirror.data).copy_(local_tensor(self.parameters[TIED].data))

    # --- gathering ------------------------------------------------------------------------------

    def stream(
        self,
        pick: Callable[[nn.Parameter], Tensor | None],
        *,
        trained: bool = False,
        own_shapes: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, global tensor) of every parameter of the model, on every rank, in one order.

        ``trained``: of those that are trained alone.

        ``own_shapes``: what is picked may be of another shape and dtype than its parameter, or
        None, and then is left out.
        """
        for name, (shape, home, learns) in self.catalogue.items():
            if trained and not learns:
                continue
            value = pick(self.parameters[name]) if name in self.parameters else None
            value = None if value is None else full_tensor(value, self.mesh)
            if name in self.quantised:
                value = self.quantised[name].whole()
            if self.mesh.layout.pp > 1:
                some = local_tensor(next(iter(self.parameters.values())).data)
                head = str(some.dtype)[6:], list(shape)
                if own_shapes:
                    said = None if value is None else [str(value.dtype)[6:], list(value.shape)]
                    group, mine = self.mesh.groups["pp"], self.mesh.place["pp"] == home
                    told = broadcast_bytes(json.dumps(said).encode() if mine else None, home, group)
                    head = json.loads(told)
                if head is not None:
                    value = self._from_stage(value, head, home, some.device)
            if value is not None:
                yield name, value

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See `engines.base.Engine.load_weights`."""
        held: dict[str, nn.Parameter | QuantisedWeight]
        held = {**self.parameters, **self.quantised}
        missing = {name for name in held if not is_adapter(name)}
        for name, value in stream:
            parameter = held.get(name)
            if parameter is None:
                continue
            if parameter.shape != value.shape:
                raise CheckpointError(
                    f"tensor {name!r} has shape {tuple(value.shape)}, but the model's parameter "
                    f"has {tuple(parameter.shape)}"
                )
            if isinstance(parameter, QuantisedWeight):
                parameter.load(value)
            else:
                place(parameter.data, lambda rows, v=value: v[rows])  # type: ignore[misc]
            missing.discard(name)
        return list(missing)

    def weight(self, name: str) -> Tensor:
        """The whole weight of a name held here; a collective call of its pipeline stage."""
        if name in self.quantised:
            return self.quantised[name].whole()
        return full_tensor(self.parameters[name].data, self.mesh)

    def _from_stage(
        self, value: Tensor | None, head: tuple[str, list[int]], home: int, device: torch.device
    ) -> Tensor:
        """A tensor of pipeline rank ``home``, on all pipeline ranks; ``head``: dtype and shape."""
        if value is None:
            value = torch.empty(head[1], dtype=getattr(torch, head[0]), device=device)
        value = value.contiguous()
        dist.broadcast(value, group_src=home, group=self.mesh.groups["pp"])
        return value

    @functools.cached_property
    def catalogue(self) -> dict[str, tuple[torch.Size, int, bool]]:
        """Shape, pipeline rank and whether it is trained of every parameter of the model.

        From configs alone.
        """
        layout = self.mesh.layout
        home, trained = homes(layout), TrainedPart(self.trained, self.config)
        found: dict[str, tuple[torch.Size, int, bool]] = {}
        for number, layers in enumerate(split_model(self.config, layout.num_chunks)):
            with torch.device("meta"):
                part = registry.build(self.config)
            part.keep(layers)
            trained.apply(part)
            for name, parameter in part.named_parameters():
                found.setdefault(name, (parameter.shape, home[number], parameter.requires_grad))
        return found
