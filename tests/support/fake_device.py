"""A device that is no CPU, made of nothing: what a GPU would refuse or wait for, it tells.

PyTorch lets Python register a device. A tensor on this one is a fake tensor, so PyTorch's own rules
say which devices and shapes go together, and it carries its values on the CPU (``twin``), so that a
step that branches on them goes on as it would. What the host reads of them is noted, with the place
in the product that reads it. A registered device stays: use it in a process of its own.

The process group is PyTorch's fake one: this process is one rank of a world whose other ranks say
what this one says. What they say in CPU tensors can be given (``said``), as another rank's run has
left it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives as _registers  # noqa: F401  (c10d's fake kernels)
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "imaginary"
PACKAGE = "shardwise."
_aten = torch.ops.aten
# Operators whose index may be a mask: then the device counts before it can go on.
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_INDEXED |= {_aten._index_put_impl_.default}


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        """Streams wait for streams; the host does not."""

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        raise AssertionError("the host waits for a stream")


class _Event(_Stream):
    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """``torch.imaginary``."""

    Stream, Event = _Stream, _Event

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def set_device(self, device: Any) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]  # recompute asks


def register() -> torch.device:
    """Make the device known to this process, once and for all."""
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    return torch.device(NAME, 0)


@contextlib.contextmanager
def process_group(rank: int, world: int) -> Any:
    """This process as ``rank`` of a world of which nobody else is there."""
    backend = f"cpu:fake,{NAME}:fake"
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclasses.dataclass(frozen=True, order=True)
class Seen:
    """Something that a device's owner wants to know, and the function of the product it is in.

    kind: ``number`` (the host reads one), ``shape`` (a shape follows from values), ``to host`` and
    ``to device`` (a copy that the host waits for), ``fp64`` (a result in it).
    """

    kind: str
    place: str


class FakeDevice(TorchDispatchMode):
    """Inside it, tensors can be on the device. ``seen``: what was seen, ``operators``: what ran."""

    def __init__(self, said: Iterable[Tensor] | None = None) -> None:
        super().__init__()
        self.forget()
        self.saying: list[Tensor] = []
        self.said = None if said is None else iter(said)
        self.mode = FakeTensorMode()

    def forget(self) -> None:
        """What was seen up to now does not count."""
        self.seen: set[Seen] = set()
        self.operators: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        flat = list(_leaves((args, kwargs)))
        if any(isinstance(x, DTensor) for x in flat):
            return NotImplemented  # it comes back with its local tensors
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        here = any(isinstance(x, FakeTensor) for x in flat)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, here)
        if not here and target != NAME:
            return func(*args, **kwargs)
        if func._schema.name in OPDEFS:  # an operator of the product's: what it is made of runs
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        self.operators.add(func.name())
        t_args, t_kwargs = _map(_twin, (args, kwargs))
        with no_dispatch():
            value = func(*t_args, **t_kwargs)
            if "empty" in func._schema.name:
                value.zero_()
        if func is _aten._local_scalar_dense.default:
            self._note("number")
            return value
        if target not in (None, NAME) or (func is _aten.copy_.default and not _is_here(args[0])):
            self._note("to host")
            return args[0] if func is _aten.copy_.default else value.clone()
        if not here or func is _aten.copy_.default:
            self._note_arrival(func, args, kwargs)
        if _shape_follows_from_values(func, args):
            self._note("shape")
            return _map(lambda v: self._place(v) if isinstance(v, Tensor) else v, value)
        f_args, f_kwargs = _map(self._known, (args, kwargs))
        with self.mode:
            out = func(*f_args, **f_kwargs)
        for fake, real in zip(_leaves(out), _leaves(value), strict=True):
            if isinstance(fake, FakeTensor):
                assert (fake.shape, fake.dtype) == (real.shape, real.dtype), func
                fake.twin = real  # type: ignore[attr-defined]
                if fake.dtype == torch.float64:
                    self._note("fp64")
        return out

    def __enter__(self) -> FakeDevice:
        # So that torch.tensor(..., device=...) comes by here: its copy is one, too.
        self.lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lifting)

    def _note(self, kind: str) -> None:
        self.seen.add(Seen(kind, _place_in_product()))

    def _note_arrival(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A copy from the CPU, unless the host goes on while it travels."""
        source = args[1] if func is _aten.copy_.default else args[0] if args else None
        waits = not kwargs.get("non_blocking", False)
        if isinstance(source, Tensor) and not _is_here(source) and not source.is_meta and waits:
            self._note("to device")

    def _place(self, value: Tensor, device: torch.device | None = None) -> FakeTensor:
        with no_dispatch():
            meta = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device="meta"
            )
        fake = FakeTensor(self.mode, meta, device or torch.device(NAME, 0))
        fake.twin = value  # type: ignore[attr-defined]
        return fake

    def _known(self, x: Any) -> Any:
        """Tensors of the CPU as fake ones of the CPU, so that mixing is refused."""
        outside = isinstance(x, Tensor) and not _is_here(x)
        return self._place(x, x.device) if outside else x

    def _collective(self, func: Any, args: Any, kwargs: dict[str, Any], here: bool) -> Any:
        if not here:
            if func._schema.name == "c10d::broadcast_":
                self._hear(args[0][0])
            return func(*args, **kwargs)
        self.operators.add(func.name())
        with self.mode:
            out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("c10d::")
        if name in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"):
            result, mine = args[0].twin.view(-1), args[1].twin.reshape(-1)
            repeats = -(-result.numel() // max(1, mine.numel()))
            result.copy_(mine.repeat(repeats)[: result.numel()])
        return out

    def _hear(self, message: Tensor) -> None:
        if self.said is not None:
            message.copy_(next(self.said))
        self.saying.append(message.clone())


def _leaves(x: Any) -> Iterator[Any]:
    """Of nested tuples, lists and dicts, which is all that operators take."""
    if isinstance(x, (tuple, list)):
        for item in x:
            yield from _leaves(item)
    elif isinstance(x, dict):
        yield from _leaves(list(x.values()))
    else:
        yield x


def _map(fn: Callable[[Any], Any], x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(_map(fn, item) for item in x)
    if isinstance(x, dict):
        return {name: _map(fn, item) for name, item in x.items()}
    return fn(x)


def _is_here(x: Any) -> bool:
    return isinstance(x, FakeTensor)


def _twin(x: Any) -> Any:
    if isinstance(x, FakeTensor):
        return x.twin  # type: ignore[attr-defined]
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _shape_follows_from_values(func: Any, args: Any) -> bool:
    if func in _INDEXED:
        masks = (torch.bool, torch.uint8)
        return any(isinstance(i, Tensor) and i.dtype in masks for i in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _place_in_product() -> str:
    """module.function of the innermost frame that is the product's."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PACKAGE):
            function = frame.f_code.co_qualname.split(".<locals>")[0]
            return f"{module.removeprefix(PACKAGE)}.{function}"
        frame = frame.f_back
    return "elsewhere"
