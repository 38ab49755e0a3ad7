"""FP8 as a swap: which products of a model are quantised, and the scales that they share.

Delayed scaling updates once a step, not once a forward pass as Transformer Engine's autocast does:
the amaxes of all micro-batches and of all ranks that hold parts of a layer (its amax reduction
group: data, context and tensor ranks) are reduced together after the last backward pass. So scales
are the same numbers whatever the layout, the number of micro-batches or the pipeline's order, and
a history can be resumed on another layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from shardwise.config.schema import Fp8Config, NativeConfig
from shardwise.errors import ConfigError
from shardwise.models import registry
from shardwise.models.common.config import DecoderConfig
from shardwise.models.common.decoder import Decoder
from shardwise.ops import comm, fp8, transformer_engine
from shardwise.ops.fp8_linear import Site
from shardwise.parallel.layout import SPLIT_BACKWARD, Layout
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.quantised import quantised_linears
from shardwise.parallel.tensor import swapped_linear
from shardwise.precision.policy import precision_of
from shardwise.precision.sentinel import Sentinel
from shardwise.precision.transformer_engine import TransformerEngine

# Shape suffixes: S quantised layers held here, H steps of history, 3 operands (x, w, g).


def recipe_of(config: Fp8Config) -> fp8.Recipe:
    """What the quantisers need to know of a config."""
    hybrid = config.format == "hybrid"
    if config.format == "auto":
        hybrid = config.recipe in ("delayed", "current")
    return fp8.Recipe(
        scaling=config.recipe,
        backward=fp8.E5M2 if hybrid else fp8.E4M3,
        history=config.amax_history_len,
        margin=config.margin,
        compute=config.amax_compute,
    )


def backend(engine: NativeConfig, layout: Layout, device: torch.device) -> tuple[str, str]:
    """``te`` or ``emulated``, and why. Raises ConfigError where ``te`` is asked for in vain."""
    config = engine.fp8
    assert config is not None
    if config.backend == "emulated":
        return "emulated", "asked for"
    dtype = precision_of(engine.precision, device).compute
    reason = transformer_engine.unusable(device, dtype, config.recipe)
    if reason is None and engine.recompute == "selective":
        reason = "Transformer Engine recomputes whole blocks only (engine.recompute=full)"
    if reason is None and layout.pp > 1 and layout.schedule in SPLIT_BACKWARD:
        reason = f"{layout.schedule} computes weight products apart; use 1f1b or interleaved"
    if reason is None:
        return "te", "it can run here"
    if config.backend == "te":
        raise ConfigError(
            f"engine.fp8.backend: te, but {reason}; or use auto, which emulates in that case"
        )
    return "emulated", reason


class Fp8:
    """The quantised layers of one model on this rank, their scales and what the step has seen."""

    def __init__(self, engine: NativeConfig, model: DecoderConfig, mesh: Mesh) -> None:
        config = engine.fp8
        assert config is not None
        self.config, self.mesh, self.recipe = config, mesh, recipe_of(config)
        self.layers = {q.path: q for q in quantised_linears(model, config)}
        self.sites: dict[str, Site] = {}
        self.sentinel = Sentinel(config.sentinel, list(self.layers))
        self.events: list[tuple[str, str]] = []  # kind and text, until somebody logs them
        self.table = registry.sharding(model)
        self.library: TransformerEngine | None = None
        name, why = backend(engine, mesh.layout, mesh.device)
        self.events.append(("fp8", f"engine.fp8 is computed by {name}: {why}"))
        if name == "te":
            dtype = precision_of(engine.precision, mesh.device).compute
            self.library = TransformerEngine(self.recipe, mesh, dtype)
        self._memory(0)

    def _memory(self, num_sites: int) -> None:
        device = self.mesh.device
        history = self.recipe.history if self.recipe.scaling == "delayed" else 0
        self.history_SH3 = torch.zeros((num_sites, history, 3), device=device)
        self.scale_S3 = torch.ones((num_sites, 3), device=device)
        self.amax_S3 = torch.zeros((num_sites, 3), device=device)

    def attach(self, model: Decoder) -> None:
        """Swap the products of a part of the model, on the meta device or not, in place."""
        present = dict(model.named_modules())
        held = [path for path in self.layers if path in present]
        place = self.mesh.place
        part = place["cp"] * self.mesh.layout.tp + place["tp"]
        for path in held:
            self.sites[path] = Site(path, self.recipe, self.scale_S3, self.amax_S3, part=part)
        for path in held:
            swapped_linear(model, path).matmul = self.sites[path].linear
        self._memory(len(self.sites))
        for i, site in enumerate(self.sites.values()):
            site.scale_3, site.amax_3 = self.scale_S3[i], self.amax_S3[i]
        if self.library is not None:
            self.library.attach(model, self.table, {path: self.sites[path] for path in held})

    # --- the step -------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Before the first forward pass of a step (counted from 0)."""
        self.amax_S3.zero_()
        self.sentinel.begin(step, self.sites, self.mesh.device)

    @property
    def checkpoint(self) -> Callable[..., Any] | None:
        """How blocks are recomputed, where the backend has a way of its own."""
        return None if self.library is None else transformer_engine.checkpoint

    def computing(self, *, training: bool) -> contextlib.AbstractContextManager[None]:
        """Around all forward and backward passes of a step, or around passes without gradient."""
        if self.library is None:
            return contextlib.nullcontext()
        return self.library.step() if training else self.library.evaluation()

    @torch.no_grad()
    def finish_step(self, step: int) -> dict[str, float]:
        """After the last backward pass: reduce amaxes, move histories and scales on.

        Returns the sentinel's metrics, the same on every rank.
        """
        metrics, events = self.sentinel.finish(step, self.sites, self.mesh.groups["all"])
        self.events += events
        if self.recipe.scaling == "delayed" and self.sites:
            comm.all_max(self.amax_S3, self.mesh.groups["stage"], "amax")
            if self.library is not None:  # a layer that computed there has shown no amax here
                here = (self.amax_S3 != 0).any(dim=1).tolist()
                self.library.read(row for row, ours in zip(self._rows(), here) if not ours)
            self.history_SH3[:], self.scale_S3[:] = fp8.delayed_update(
                self.history_SH3, self.scale_S3, self.amax_S3, self.recipe
            )
            if self.library is not None:
                self.library.write(row for row, ours in zip(self._rows(), here) if ours)
            self._calibrate()
        return metrics

    def _calibrate(self) -> None:
        """Tell the layers which operands have a scale from a history.

        A scale that is not its initial 1 has; a history of one step leaves nothing else behind. A
        history with an infinity has given none yet.
        """
        if not all(all(site.calibrated) for site in self.sites.values()):
            window_S3 = self.history_SH3.nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1)
            known_S3 = (self.scale_S3 != 1) | (window_S3.isfinite() & (window_S3 > 0))
            for site, known in zip(self.sites.values(), known_S3.tolist(), strict=True):
                site.calibrated = known

    # --- state ----------------------------------------------------------------------------------

    def _rows(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Path, amax history (H3) and scale (3) of each layer, live."""
        yield from zip(self.sites, self.history_SH3, self.scale_S3)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """``fp8.<path>.amax_history`` (H3) and ``.scale`` (3), live."""
        if self.recipe.scaling == "delayed":
            for i, path in enumerate(self.sites):
                yield f"fp8.{path}.amax_history", self.history_SH3[i]
                yield f"fp8.{path}.scale", self.scale_S3[i]

    @property
    def observed(self) -> frozenset[str]:
        """Which of `tensors` may hold infinities: what an overflow has shown; no scale does."""
        return frozenset(name for name, _ in self.tensors() if name.endswith(".amax_history"))

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs besides `tensors`, as JSON values."""
        return {"sentinel": self.sentinel.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict`; `tensors` were filled in place before."""
        self.sentinel.load_state_dict(state["sentinel"], self.sites)
        if self.recipe.scaling == "delayed":
            for site in self.sites.values():
                site.calibrated = (False, False, False)
            self._calibrate()
            if self.library is not None:
                self.library.write(self._rows())
