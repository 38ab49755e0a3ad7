"""The one place that imports Transformer Engine (2.3 to 2.20), and says why when it cannot be used.

Releases differ in the name of the autocast and in where its state lives; nothing else that we call
does, which the contract tests hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.ops import fp8

# Shape suffixes: H steps of history, 3 operands of a layer (x, w, g).

# The compute capability that a recipe's products need.
NEEDS: dict[fp8.Scaling, tuple[int, int]] = {
    "delayed": (8, 9),
    "current": (8, 9),
    "block": (9, 0),
    "mxfp8": (10, 0),
}
_CHECKS = {"block": "check_fp8_block_scaling_support", "mxfp8": "check_mxfp8_support"}


@functools.cache
def _library() -> tuple[Any, str]:
    """The imported ``transformer_engine.pytorch``, or None and why not."""
    if not torch.cuda.is_available():
        return None, "no CUDA device"
    try:
        return importlib.import_module("transformer_engine.pytorch"), ""
    except (ImportError, OSError, RuntimeError) as error:  # its extensions may not load
        return None, (
            f"transformer-engine cannot be imported ({error}); pip install 'shardwise[gpu]'"
        )


def _loaded() -> Any:
    library, reason = _library()
    assert library is not None, reason
    return library


@functools.cache
def _quantization() -> Any:
    """The module that holds the autocast's state: ``fp8`` before 2.9."""
    name = _loaded().__name__
    try:
        return importlib.import_module(f"{name}.quantization")
    except ModuleNotFoundError:
        return importlib.import_module(f"{name}.fp8")


def unusable(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, scaling: fp8.Scaling = "delayed"
) -> str | None:
    """None when Transformer Engine will compute so on ``device``, else the reason."""
    if device.type != "cuda":
        return f"Transformer Engine runs on CUDA only, not on {device.type}"
    if dtype == torch.float64:
        return "Transformer Engine does not compute in fp64"
    library, reason = _library()
    if library is None:
        return reason
    needed, found = NEEDS[scaling], torch.cuda.get_device_capability(device)
    if found < needed:
        return (
            f"{scaling} scaling needs a GPU of compute capability {needed[0]}.{needed[1]} or more; "
            f"this one has {found[0]}.{found[1]}"
        )
    fine, why = getattr(_quantization(), _CHECKS.get(scaling, "check_fp8_support"))()
    return None if fine else f"Transformer Engine refuses {scaling} scaling here: {why}"


def library_recipe(recipe: fp8.Recipe) -> Any:
    """Its recipe for ours; every default that matters is given by name."""
    recipes = importlib.import_module("transformer_engine.common.recipe")
    hybrid = recipe.backward == fp8.E5M2
    shared = {"fp8_format": recipes.Format.HYBRID if hybrid else recipes.Format.E4M3}
    if recipe.scaling == "delayed":
        return recipes.DelayedScaling(
            margin=recipe.margin,
            amax_history_len=recipe.history,
            amax_compute_algo=recipe.compute,
            reduce_amax=True,
            **shared,
        )
    kinds = {
        "current": "Float8CurrentScaling",
        "block": "Float8BlockScaling",
        "mxfp8": "MXFP8BlockScaling",
    }
    return getattr(recipes, kinds[recipe.scaling])(**shared)


@contextlib.contextmanager
def computing(recipe: Any, group: dist.ProcessGroup | None, enabled: bool = True) -> Iterator[None]:
    """Its modules inside compute in FP8. ``group`` shares the amaxes of delayed scaling."""
    library = _loaded()
    if hasattr(library, "autocast"):
        context = library.autocast(enabled=enabled, recipe=recipe, amax_reduction_group=group)
    else:  # before 2.9
        context = library.fp8_autocast(enabled=enabled, fp8_recipe=recipe, fp8_group=group)
    with context:
        yield


@contextlib.contextmanager
def step(recipe: Any, group: dist.ProcessGroup | None) -> Iterator[None]:
    """All micro-batches of one training step, forward and backward.

    By itself the library moves the scales of inputs and weights on when an autocast ends, and
    those of gradients after the first of its backward passes. One autocast around the step, with
    that first backward pass spoken for, moves each on once a step, after all of them.
    """
    states = _quantization().FP8GlobalStateManager
    with computing(recipe, group):
        states.is_first_fp8_module()
        yield
    states.reduce_and_update_fp8_tensors(forward=False)


# --- modules ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a linear layer is cut: its collectives happen inside the library."""

    mode: str | None = None  # column, row
    group: dist.ProcessGroup | None = None
    size: int = 1
    sequence: bool = False  # tokens are cut along the first dimension outside

    def arguments(self) -> dict[str, Any]:
        """As both modules take them."""
        return {
            "parallel_mode": self.mode,
            "tp_group": self.group,
            "tp_size": self.size,
            "sequence_parallel": self.sequence,
        }


def linear(
    name: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    parallel: Parallel,
) -> nn.Module:
    """Its Linear, without memory: `call` brings the weights. Sizes are those before the cut.

    ``name`` is what its debugging tools will call it.
    """
    module: nn.Module = _loaded().Linear(
        in_features,
        out_features,
        bias=bias,
        params_dtype=dtype,
        device="meta",
        name=name,
        **parallel.arguments(),
    )
    return module


def norm_linear(
    name: str,
    in_features: int,
    out_features: int,
    *,
    eps: float,
    centred: bool,
    bias: bool,
    dtype: torch.dtype,
    parallel: Parallel,
) -> nn.Module:
    """Its LayerNormLinear, like `linear`; ``centred``: LayerNorm, else RMSNorm."""
    module: nn.Module = _loaded().LayerNormLinear(
        in_features,
        out_features,
        eps=eps,
        normalization="LayerNorm" if centred else "RMSNorm",
        bias=bias,
        params_dtype=dtype,
        device="meta",
        name=name,
        **parallel.arguments(),
    )
    return module


def call(module: nn.Module, tensors: Mapping[str, Tensor | None], x: Tensor) -> Tensor:
    """``module(x)`` with ``tensors`` for its parameters; gradients arrive at the tensors."""
    given = {name: t for name, t in tensors.items() if t is not None}
    out: Tensor = torch.func.functional_call(module, given, (x,), tie_weights=False)  # type: ignore[arg-type]
    return out


def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Recompute ``function`` in the backward pass, with the scales of the forward pass."""
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return _loaded().checkpoint(function, *args, use_reentrant=False, **kwargs)


# --- the memory of delayed scaling --------------------------------------------------------------


def _memory(module: Any) -> tuple[Any, Any]:
    # Of the operands of its products: (x, w, y) forward, (g, dx) backward.
    return module.fp8_meta["scaling_fwd"], module.fp8_meta["scaling_bwd"]


def read_memory(module: Any, history_H3: Tensor, scale_3: Tensor) -> bool:
    """Copy a module's amax history and scales; False before its first forward pass."""
    if "scaling_fwd" not in module.fp8_meta:
        return False
    forward, backward = _memory(module)
    scale_3.copy_(torch.cat([forward.scale[:2], backward.scale[:1]]))
    history_H3.copy_(torch.cat([forward.amax_history[:, :2], backward.amax_history[:, :1]], dim=1))
    return True


def write_memory(
    module: Any, history_H3: Tensor, scale_3: Tensor, recipe: Any, group: dist.ProcessGroup | None
) -> None:
    """Copy them back, also into a module that has not computed yet."""
    with torch.no_grad(), computing(recipe, group):
        module.init_fp8_metadata()
        forward, backward = _memory(module)
        forward.scale[:2].copy_(scale_3[:2])
        backward.scale[:1].copy_(scale_3[2:])
        forward.amax_history[:, :2].copy_(history_H3[:, :2])
        backward.amax_history[:, :1].copy_(history_H3[:, 2:])
