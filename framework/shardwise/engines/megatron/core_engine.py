"""The megatron engine whose masters, clipping and update are Megatron's own.

There is no second copy of a weight: what is saved, loaded, compared and sent to a sampler is read
from its optimizer by our names (`optimizer.Master`), and what computes follows its masters by its
own means, the gathering behind an update.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.assemble import Assembled
from shardwise.config.optimizers import SgdConfig
from shardwise.engines.base import Setup, State
from shardwise.engines.megatron import names
from shardwise.engines.megatron.engine import MegatronEngine
from shardwise.engines.megatron.optimizer import CoreOptimizer, Master, is_distributed
from shardwise.engines.reduction import sum_over
from shardwise.models.common.init import init_spec, init_tensor, place
from shardwise.parallel.mesh import Mesh


class CoreOptimizerEngine(MegatronEngine):
    """See `engines.base.Engine`, and the module."""

    def __init__(self, setup: Setup, mesh: Mesh) -> None:
        self.deals_out = is_distributed(mesh)
        super().__init__(setup, mesh)

    def _masters(self, setup: Setup) -> dict[str, Any]:
        return {"assembled": Assembled({}, frozenset())}

    def _start(self, setup: Setup) -> None:
        assert setup.optimizer is not None
        self.rule = setup.optimizer
        shapes = {name: shape for name, (shape, *_) in self.named.catalogue.items()}
        here = self.mesh.place["pp"]
        missing = {n for n, (_, home, _) in self.named.catalogue.items() if home == here}
        assert missing <= set(self.places), f"not in Megatron's: {missing - set(self.places)}"
        names.mark(self.places, shapes, self.mesh)
        with self._updating():
            self.core = CoreOptimizer(
                self.rule,
                self.config.max_grad_norm,
                self.parts,
                self.places,
                self.mesh,
                self.precision,
                self.groups,
            )
        masters = {n: Master(p, shapes[n], self.core, self.mesh) for n, p in self.places.items()}
        self.named.parameters.update(masters)  # type: ignore[arg-type]
        for name, master in masters.items():  # a pure function of (seed, name)
            shape, how = tuple(master.shape), init_spec(name, self.model_config.spec)
            place(
                master.data,
                lambda rows, n=name, s=shape, h=how: init_tensor(n, s, h, setup.seed, rows),  # type: ignore[misc]
            )
        self._refresh()

    def _updating(self) -> contextlib.AbstractContextManager[None]:
        """Around calls into Megatron's optimizer."""
        if self.mesh.device.type != "cpu":
            return contextlib.nullcontext()
        from shardwise.engines.megatron import cpu

        return cpu.updating(self.precision.master)

    # --- training -------------------------------------------------------------------------------

    def step(self, lr: float) -> float:
        """See `engines.base.Engine`: clipped, updated and gathered by Megatron."""
        with self._updating():
            norm = self.core.step(lr, self.loss_scale)
        self._written = self.core.written()
        finite = math.isfinite(norm)
        if self.scale:
            self.scale.update(found_nonfinite=not finite)
        self._has_gradients = False
        self.updates += 1
        self.skipped += not finite
        return norm

    def _take_gradients(self) -> None:
        """They stay where Megatron reduced them to."""

    def _send_weights(self) -> None:
        """Nothing, unless somebody else has written into masters, on some rank."""
        changed = torch.tensor(float(self.core.written() != self._written))
        if bool(sum_over(changed.double().to(self.mesh.device), self.mesh.groups["all"])):
            self._refresh()

    def _refresh(self) -> None:
        with self._updating():
            self.core.follow()
        self._written = self.core.written()

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """See `engines.base.Engine`: what the optimizer keeps, live."""
        state = super().state_dict()
        for name, where in self.places.items():
            master: Any = self.named.parameters[name]
            for kind, scalar in self.core.tensors_of(where.parameter).items():
                value = master.of(kind) if scalar is None else scalar
                state.tensors[f"optim.{name}.{kind}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Any] | State) -> None:
        """See `engines.base.Engine`."""
        super().load_state_dict(state)
        self._refresh()

    def load_weights(self, stream: Iterable[tuple[str, Tensor]]) -> list[str]:
        """See `engines.base.Engine`."""
        missing = super().load_weights(stream)
        self._refresh()
        return missing

    def _pick(self, kind: str, parameter: nn.Parameter) -> Tensor | None:
        master: Any = parameter
        return master.of(kind)  # type: ignore[no-any-return]

    def _copy(self, name: str) -> Tensor:
        master: Any = self.named.parameters[name]
        return master.of("copies")  # type: ignore[no-any-return]

    def optimizer_states(self) -> list[str]:
        """See `engines.base.Engine`."""
        if isinstance(self.rule, SgdConfig):
            return ["momentum_buffer"] if self.rule.momentum else []
        return ["exp_avg", "exp_avg_sq"]

    def close(self) -> None:
        """See `engines.base.Engine`."""
        super().close()
        del self.core
