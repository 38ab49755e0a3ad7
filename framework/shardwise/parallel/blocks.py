"""Recompute and compile, applied to each block from outside by replacing its ``forward``.

The order is fixed: recompute wraps the compiled forward. The reverse fails under FSDP2.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from shardwise.config.schema import EngineConfig
from shardwise.errors import ConfigError
from shardwise.ops import compile_caches
from shardwise.ops import cpu_attention as _registered  # noqa: F401  (its operator is named below)

Recompute = Literal["none", "selective", "full"]

# What selective recompute keeps: the results of matrix products and of attention, which are dear
# to compute. Norms, rotations and activations are computed again (Korthikanti et al., 2022, keep
# likewise what is large per FLOP out of memory).
_aten = torch.ops.aten
KEPT_OPS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    torch.ops.shardwise.cpu_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
# Those of flash-attn (2.7 or newer) are there only once it has been imported.
KEPT_NAMES = {"flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward"}
# The compiled counterpart: the partitioner may keep this fraction of what it would like to keep.
COMPILED_SELECTIVE_BUDGET = 0.5


def compiler_available(device: torch.device) -> bool:
    """Whether torch.compile can produce code for ``device`` here."""
    if device.type == "cuda":
        try:
            import triton  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            return False
        return True
    return any(shutil.which(c) for c in ("g++", "clang++", "c++"))


def wants_compile(engine: EngineConfig, device: torch.device | None) -> bool:
    """Resolve ``engine.compile``; ``auto`` compiles where a compiler exists and can follow.

    ``device`` None: on another machine, which is taken to have a compiler.

    It cannot follow quantised products (`feasible` refuses ``true``). Kinds of engines without the
    key do not compile.
    """
    setting: bool | str = getattr(engine, "compile", False)
    if setting == "auto":
        return engine.fp8 is None and (device is None or compiler_available(device))
    if setting and device is not None and not compiler_available(device):
        raise ConfigError(
            "engine.compile=true, but no C++ compiler (or Triton, for GPUs) was found; "
            "install g++ or use engine.compile=false"
        )
    return bool(setting)


def compiled(forward: Any, breaks: bool) -> Any:
    """A block's forward, compiled."""
    return torch.compile(forward, fullgraph=not breaks)


def wrap_blocks(
    model: nn.Module,
    recompute: Recompute,
    compile: bool,
    checkpoint: Callable[..., Any] | None = None,
    *,
    breaks: bool = False,
) -> None:
    """Replace the forward of every ``model.layers[i]``; parameter names do not change.

    ``breaks``: a compiled block may have graph breaks, as context parallelism makes; without it,
    one is an error.
    ``checkpoint(forward, *args)`` is for blocks that must be recomputed (in full) in a way of
    their own.
    """
    if compile:
        compile_caches.secure()
    for block in filter(None, model.layers):  # type: ignore[arg-type]
        forward = block.forward
        if compile:
            forward = compiled(forward, breaks)
            if recompute == "selective":
                forward = _with_budget(forward)
        if recompute == "full" or (recompute == "selective" and not compile):
            if checkpoint is None:
                forward = _recomputed(forward, selective=recompute == "selective")
            else:
                assert recompute == "full"
                forward = functools.partial(checkpoint, forward)
        if forward is not block.forward:
            block.forward = forward  # type: ignore[method-assign]


def _recomputed(forward: Any, *, selective: bool) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, _keep_dear_ops)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Dropout is a pure function of its rng keys, so no generator state needs keeping.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if selective:
            options["context_fn"] = contexts
        return checkpoint(forward, *args, **options, **kwargs)

    return run


def _keep_dear_ops(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op in KEPT_OPS or op.name() in KEPT_NAMES
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _with_budget(forward: Any) -> Any:
    import torch._functorch.config as functorch

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with functorch.patch(activation_memory_budget=COMPILED_SELECTIVE_BUDGET):
            return forward(*args, **kwargs)

    return run
