"""Megatron-core on a CPU: the one file that redirects it. For proof, and not for speed.

Megatron-core asks for memory on ``cuda`` wherever it makes some, waits for a device that is not
there, and draws from that device's generators. Within `computing` the memory is the host's, nothing
is waited for, and nothing is drawn (dropout is off). What is computed stays Megatron's. Outside of
it nothing is changed.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _OnHost(TorchFunctionMode):
    """What is asked for on ``cuda`` comes from the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _Fp32OnCuda(TorchFunctionMode):
    """Optimizers ask tensors for a type that is one of a GPU's; fp64, to the proof, is their fp32.

    ``wide``: in which masters are kept.
    """

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self.fp64 = wide == torch.float64

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is Tensor.type and len(args) == 1 and not kwargs:
            name: str = func(*args).replace("torch.", "torch.cuda.")
            return name.replace("Double", "Float") if self.fp64 else name
        if self.fp64 and func is Tensor.float:
            return args[0]
        asked = str(kwargs.get("device", "")), kwargs.get("dtype")
        if self.fp64 and asked[0].startswith("cuda") and asked[1] == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


class _NoDraws:
    """In place of the tracker of a GPU's generators."""

    def fork(self, *_: Any) -> contextlib.AbstractContextManager[None]:
        """Nothing is drawn inside."""
        return contextlib.nullcontext()


_REDIRECTED: tuple[tuple[Any, str, Any], ...] = (
    (torch.cuda, "current_device", lambda: "cpu"),
    (torch.cuda, "current_stream", lambda *_: None),
    (torch.cuda, "synchronize", lambda *_: None),
    (tensor_parallel, "get_cuda_rng_tracker", lambda *_, **__: _NoDraws()),
)


@contextlib.contextmanager
def updating(wide: torch.dtype) -> Iterator[None]:
    """`computing`, around calls into an optimizer of Megatron's."""
    with computing(), _Fp32OnCuda(wide):
        # It puts gradients on views of weights.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Around every call into Megatron-core. A process without threads beside it is taken for
    granted: what is redirected is so for all of it.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _REDIRECTED]
    try:
        for owner, name, value in _REDIRECTED:
            setattr(owner, name, value)
        with warnings.catch_warnings(), _OnHost():
            # How a GPU would be faster, and which of PyTorch's collectives have new names.
            warnings.filterwarnings("ignore", module=r"megatron\.")
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
