"""What the megatron engine cannot compute rightly: one table, asked before anything is built.

Each row is a reason with the key and the mend. What no engine can have is `parallel.feasible`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardwise.adapters.trained import EVERYTHING, Trained
from shardwise.checkpoint.megatron_names import beyond_megatron
from shardwise.config.optimizers import AdamWConfig, OptimizerConfig, SgdConfig
from shardwise.engines.megatron.config import MegatronConfig
from shardwise.errors import ConfigError
from shardwise.models.common.config import DecoderConfig
from shardwise.parallel.layout import Layout

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("1f1b", "interleaved")
FUSED = (("attn.q", "attn.k", "attn.v"), ("mlp.gate", "mlp.up"))  # see `names`


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked of the engine."""

    model: DecoderConfig
    config: MegatronConfig
    layout: Layout
    device: str = "cuda"
    optimizer: OptimizerConfig | None = None
    trained: Trained = EVERYTHING
    everywhere: bool = True  # on all ranks of the world


def _without_gpu(case: Case) -> str | None:
    if case.device != "cpu" or case.config.cpu_shim:
        return None
    return (
        "engine.kind: megatron computes on GPUs, and there is none here; write kind: native, or "
        "cpu_shim: true for a slow run through a shim that proves numbers"
    )


def _switches(case: Case) -> str | None:
    field = beyond_megatron(case.model)
    if field is None:
        return None
    return (
        f"model.family: {case.model.family} computes {field}, and megatron does not: write kind: "
        "native"
    )


def _dropout(case: Case) -> str | None:
    if case.model == case.model.without_dropout():
        return None
    keys = [k for k in type(case.model).model_fields if "dropout" in k and getattr(case.model, k)]
    return (
        f"model.{keys[0]}: megatron draws dropout's masks from generators of its own, which other "
        "layouts do not share; set it to 0, or write kind: native"
    )


def _output_bias(case: Case) -> str | None:
    layer = case.model.spec.layer
    if layer.o_bias == layer.mlp_bias and (layer.qkv_bias or not layer.mlp_bias):
        return None
    key = "o_bias" if layer.o_bias else "mlp_bias"
    return f"model.{key}: megatron has it with a bias in every layer alone; write kind: native"


def _zero(case: Case) -> str | None:
    layout = case.layout
    if layout.zero < 2 or layout.dp == 1:
        return None
    near = dataclasses.replace(layout, zero=1)
    return (
        f"engine.layout: {layout}: megatron keeps weights and gradients whole on every data rank; "
        f"write {near}, or kind: native"
    )


def _replicas(case: Case) -> str | None:
    layout = case.layout
    if layout.cp == 1 or not layout.zero or layout.shard == layout.dp:
        return None
    near = dataclasses.replace(layout, shard=layout.dp)
    return (
        f"engine.layout: {layout}: megatron sums gradients over data and context ranks in one "
        f"group, and hsdp has two; write {near}, or kind: native"
    )


def _schedule(case: Case) -> str | None:
    layout = case.layout
    if layout.pp == 1 or layout.schedule in SCHEDULES:
        return None
    return (
        f"engine.layout: {layout}: megatron's schedules are {', '.join(SCHEDULES)}; "
        "choose one, or write kind: native"
    )


def _widths(case: Case) -> str | None:
    """Megatron cuts evenly, or not at all."""
    tp, model = case.layout.tp, case.model
    for key, size in (("num_kv_heads", model.kv_heads), ("ffn_size", model.ffn_width)):
        if size % tp:
            return (
                f"engine.layout: {case.layout}: tp{tp} does not divide model.{key} {size}, and "
                "megatron cuts evenly; choose a smaller tp, or write kind: native"
            )
    return None


def _fp8(case: Case) -> str | None:
    if case.config.fp8 is None:
        return None
    return "engine.fp8: not with kind: megatron; leave it out, or write kind: native"


def _adapter(case: Case) -> str | None:
    if case.trained.adapter is None:
        return None
    return (
        f"adapter: {case.trained.adapter.kind} stands beside our layers, and megatron has others; "
        "leave it out, or write kind: native"
    )


def _optimizer(case: Case) -> str | None:
    optimizer = case.optimizer
    if optimizer is None or (optimizer.kind in OPTIMIZERS and not optimizer.in_backward):
        return None
    return (
        f"optimizer.kind: {optimizer.kind}; with kind: megatron choose {', '.join(OPTIMIZERS)}, "
        "or write engine.kind: native"
    )


# --- what Megatron's own optimizer cannot ---------------------------------------------------------


def _fp64(case: Case) -> str | None:
    if case.config.precision != "fp64" or case.device == "cpu":
        return None
    return "engine.precision: fp64: Megatron's optimizers take fp32, bf16 and fp16"


def _freeze(case: Case) -> str | None:
    if case.trained.freeze is None:
        return None
    return "freeze: Megatron's optimizer has no master for what stands still"


def _placed(case: Case) -> str | None:
    if case.everywhere:
        return None
    return "a role on some ranks: Megatron's optimizer is built by the whole world"


def _shard_groups(case: Case) -> str | None:
    layout = case.layout
    if not layout.zero or layout.shard == layout.dp:
        return None
    return f"engine.layout: {layout}: Megatron's optimizer deals states out over all data ranks"


def _rule(case: Case) -> str | None:
    optimizer, layout = case.optimizer, case.layout
    if isinstance(optimizer, SgdConfig) and optimizer.nesterov:
        return "optimizer.nesterov: Megatron's sgd has none"
    if isinstance(optimizer, AdamWConfig) and optimizer.fused == "apex":
        return "optimizer.fused: apex: Megatron takes Transformer Engine's before it"
    dealt_out = layout.zero and layout.shard * layout.cp > 1
    if optimizer is None or optimizer.kind == "adamw" or not dealt_out:
        return None
    near = dataclasses.replace(layout, zero=0, shard=1)
    return (
        f"optimizer.kind: {optimizer.kind}: Megatron's distributed optimizer knows adamw alone "
        f"(its plain one, {near}, has it)"
    )


def _fused_groups(case: Case) -> str | None:
    """What Megatron fuses has one rate and one decay."""
    optimizer = case.optimizer
    if optimizer is None:
        return None
    for layer in range(case.model.num_layers):
        for fused in FUSED:
            for kind in ("weight", "bias"):
                names = [f"layers.{layer}.{part}.{kind}" for part in fused]
                kinds = {(optimizer.lr_scale_of(n), optimizer.decay_of(n)) for n in names}
                if len(kinds) > 1:
                    return (
                        f"optimizer.groups, no_decay: {', '.join(names)} are one parameter to "
                        "Megatron's optimizer, with one rate and one decay"
                    )
    return None


# Every row is a test (tests/engines/megatron/test_refusals.py).
OF_CORE_OPTIMIZER: tuple[Callable[[Case], str | None], ...] = (
    _fp64,
    _freeze,
    _placed,
    _shard_groups,
    _rule,
    _fused_groups,
)


def of_core_optimizer(case: Case) -> str | None:
    """Why Megatron's own optimizer cannot compute what is asked."""
    return next((reason for row in OF_CORE_OPTIMIZER if (reason := row(case))), None)


def _core_optimizer(case: Case) -> str | None:
    if case.config.optimizer != "megatron" or case.optimizer is None:
        return None
    reason = of_core_optimizer(case)
    return reason and f"{reason}; write engine.optimizer: native, or auto"


# Every row is a test (tests/engines/megatron/test_refusals.py).
REFUSALS: tuple[Callable[[Case], str | None], ...] = (
    _without_gpu,
    _switches,
    _dropout,
    _output_bias,
    _zero,
    _replicas,
    _schedule,
    _widths,
    _fp8,
    _adapter,
    _optimizer,
    _core_optimizer,
)


def check(case: Case) -> None:
    """Raise ConfigError with the first reason."""
    for row in REFUSALS:
        if reason := row(case):
            raise ConfigError(reason)
