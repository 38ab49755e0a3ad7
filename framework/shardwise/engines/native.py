"""The native engine: FSDP2 sharding, accumulation, mixed precision, clipping, one update rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardwise.assemble import assemble
from shardwise.config.schema import EngineConfig, ModelConfig, OptimizerConfig
from shardwise.data.batch import MicroBatch
from shardwise.engines.base import State
from shardwise.losses.contract import Loss
from shardwise.models import registry
from shardwise.ops import dice
from shardwise.optim.build import build_optimizer, optimizer_tensors
from shardwise.parallel import data
from shardwise.parallel.collectives import sum_over
from shardwise.parallel.mesh import Mesh
from shardwise.precision.loss_scale import DynamicLossScale
from shardwise.precision.policy import PRECISIONS


class NativeEngine:
    """One model under one layout. See `engines.base.Engine` for the contract.

    Args:
        model_config: the plain model to build.
        config: layout, precision, recompute, compile, clipping.
        mesh: this process's place; made by `parallel.mesh.build_mesh`.
        seed: root of the initial weights and of dropout.
        stage: the training stage's name; part of the dropout dice.
        optimizer: None for a model that is only evaluated.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        mesh: Mesh,
        *,
        seed: int,
        stage: str = "",
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        self.model_config, self.config, self.mesh = model_config, config, mesh
        self.seed, self.stage = seed, stage
        self.data_rank, self.data_size = mesh.data_rank, mesh.data_size
        self.precision = PRECISIONS[config.precision]
        self.model = assemble(model_config, config, mesh, seed)
        self.scale = DynamicLossScale() if self.precision.loss_scaling else None
        self.updates = 0  # optimizer steps tried; with the stage's name, the time on the dice
        self.optimizer = (
            build_optimizer(self.model.named_parameters(), optimizer) if optimizer else None
        )
        self._has_dropout = getattr(model_config, "dropout", 0.0) > 0

    # --- training -------------------------------------------------------------------------------

    def forward_backward(self, microbatches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        """Accumulate the gradients of sum_i w_i * sum_i / count_i over the global batch.

        Counts are reduced over micro-batches and data ranks first (decision 2), so every rank may
        bring its own number of micro-batches as long as ZeRO does not gather per micro-batch; the
        samplers give equal numbers.
        """
        self.model.train()
        batches = [b.to(self.mesh.device) for b in microbatches]
        totals = self._global_counts(batches, loss)
        scale = self.scale.value if self.scale else 1.0
        sums: dict[str, Tensor] = {}
        metrics: dict[str, tuple[Tensor, Tensor]] = {}
        for i, batch in enumerate(batches):
            data.before_microbatch(self.model, self.mesh, is_last=i == len(batches) - 1)
            output = loss(self._logits(batch), batch)
            objective = sum(
                (
                    s * (loss.weights[name] * scale / totals[name])
                    for name, s in output.sums.items()
                ),
                start=torch.zeros((), dtype=self.precision.master, device=self.mesh.device),
            )
            objective.backward()
            for name, value in output.sums.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
            for name, (top, bottom) in output.metrics.items():
                a, b = metrics.get(name, (0.0, 0.0))
                metrics[name] = (a + top.detach().double(), b + bottom.detach().double())
        data.reshard(self.model)
        return self._reduced_metrics(sums, totals, metrics, loss)

    def step(self, lr: float) -> float:
        """Clip to ``max_grad_norm`` and update. Non-finite gradients leave the weights untouched.

        The norm is a global number, so all ranks decide alike.
        """
        assert self.optimizer is not None, "this engine was built without an optimizer"
        data.reshard(self.model)  # an evaluation may have gathered weights since
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = self._grad_norm(parameters)
        scale = self.scale.value if self.scale else 1.0
        norm /= scale
        finite = math.isfinite(norm)
        if finite:
            limit = self.config.max_grad_norm
            factor = min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
            if factor != 1.0 or scale != 1.0:
                torch._foreach_mul_([_local(p.grad) for p in parameters], factor / scale)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        if self.scale:
            self.scale.update(found_nonfinite=not finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    @torch.no_grad()
    def forward(
        self, microbatches: Sequence[MicroBatch], fn: Callable[[Tensor, MicroBatch], Any]
    ) -> list[Any]:
        """``fn(logits_BTV, batch)`` per micro-batch, without gradient and without dropout."""
        self.model.eval()
        results = []
        for batch in microbatches:
            placed = batch.to(self.mesh.device)
            results.append(fn(self._logits(placed), placed))
        return results

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum a few numbers over the data ranks, in fp64."""
        vector = torch.tensor(list(values), dtype=torch.float64, device=self.mesh.device)
        return [float(v) for v in sum_over(vector, self.mesh.data_group).tolist()]

    def _logits(self, batch: MicroBatch) -> Tensor:
        dice_BT = None
        if self.model.training and self._has_dropout:
            positions = torch.arange(batch.input_ids_BT.shape[1], device=self.mesh.device)
            dice_BT = dice.token_dice(
                self.seed, self.updates, self.stage, batch.sample_ids_B, positions
            )
        logits: Tensor = self.model(
            batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT, dice_BT=dice_BT
        )
        return logits

    def _global_counts(self, batches: Sequence[MicroBatch], loss: Loss) -> dict[str, float]:
        names = sorted(loss.weights)
        local = torch.zeros(len(names), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            counts = loss.counts(batch)
            local += torch.stack([counts[n].to(local) for n in names])
        totals = sum_over(local, self.mesh.data_group).tolist()
        # A term without a single valid element has a zero sum; dividing by 1 keeps it zero.
        return {n: t if t > 0 else 1.0 for n, t in zip(names, totals, strict=True)}

    def _reduced_metrics(
        self,
        sums: Mapping[str, Tensor],
        totals: Mapping[str, float],
        metrics: Mapping[str, tuple[Tensor, Tensor]],
        loss: Loss,
    ) -> dict[str, float]:
        """Divide once more, after one all-reduce of every sum and count."""
        terms, names = sorted(totals), sorted(metrics)
        flat = [sums.get(n, torch.zeros(())) for n in terms]
        flat += [part for n in names for part in metrics[n]]
        vector = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in flat])
        values = sum_over(vector.to(self.mesh.device), self.mesh.data_group).tolist()
        means = {n: values[i] / totals[n] for i, n in enumerate(terms)}
        result = {"loss": sum(loss.weights[n] * m for n, m in means.items())}
        if terms != ["loss"]:
            result |= {f"loss_{n}": m for n, m in means.items()}
        for i, n in enumerate(names):
            top, bottom = values[len(terms) + 2 * i : len(terms) + 2 * i + 2]
            result[n] = top / bottom if bottom else 0.0
        return result

    def _grad_norm(self, parameters: Sequence[nn.Parameter]) -> float:
        """2-norm of all gradients: squares of shards summed in fp64 over the shard group."""
        norms = torch._foreach_norm([_local(p.grad) for p in parameters], 2.0)
        local = torch.stack(norms).double().square().sum() if norms else torch.zeros(())
        return math.sqrt(sum_over(local.double(), self.mesh.shard_group).item())

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """``model.<name>`` and ``optim.<name>.<state>`` tensors, and the JSON that goes with them.

        The tensors are the live ones: loading writes into them. Gathered copies are freed first,
        so the next forward pass sees what was written.
        """
        data.reshard(self.model)
        tensors = {f"model.{n}": p.data for n, p in self.model.named_parameters()}
        if self.optimizer is not None:
            tensors |= optimizer_tensors(self.optimizer, self.model.named_parameters())
        meta: dict[str, Any] = {"updates": self.updates}
        if self.scale:
            meta["loss_scale"] = self.scale.state_dict()
        return State(tensors, meta)

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """Take over ``meta``; the tensors of `state_dict` were filled in place before."""
        meta = state.meta if isinstance(state, State) else state
        self.updates = int(meta["updates"])
        if self.scale and "loss_scale" in meta:
            self.scale.load_state_dict(meta["loss_scale"])

    @torch.no_grad()
    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full tensors under Hugging Face names, one at a time; every rank must iterate."""
        data.reshard(self.model)

        def full() -> Iterator[tuple[str, Tensor]]:
            for name, parameter in self.model.named_parameters():
                value = parameter.data
                if isinstance(value, DTensor):
                    value = value.full_tensor()
                yield name, value if dtype is None else value.to(dtype)

        yield from registry.to_hf_tensors(self.model_config, full())


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
