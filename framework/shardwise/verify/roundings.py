"""Where numbers are rounded to 16 bits, or summed in them: by line of the source.

A sum that a layout makes in bf16 where fp32 was meant costs about what bf16 costs anyway, and no
tolerance tells. So lines are told apart. What one process does at the same lines is the recipe's
precision; what a layout does besides is declared (`precision.policy.ROUNDED`); the rest is a bug.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.parallel.full_tensor import local_tensor
from shardwise.precision.policy import ROUNDED

_ROOT = str(Path(__file__).resolve().parents[1]) + "/"
_CASTS = {"aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"}
_SUMS = {
    *("aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::_foreach_add_", "aten::sum"),
    *("aten::index_add", "aten::index_add_", "aten::scatter_add", "aten::scatter_add_"),
    *("aten::lerp_", "aten::addcmul_", "aten::addmm_", "aten::baddbmm_", "aten::cumsum"),
}
_GRADIENT = "a weight's gradient"  # summed by autograd over passes
_BETWEEN = ("ops/comm.py", "engines/megatron/cpu.py")  # what a number passes through
_LIBRARIES = ("/torch/distributed/fsdp/", "/megatron/core/")
# "rounds" or "sums", and ``file function``; at which lines.
Lines = dict[tuple[str, str], set[int]]


class Roundings(TorchDispatchMode):
    """Adds to ``lines`` what happens inside; ``modules``: of whose weights gradients are made."""

    def __init__(self, lines: Lines, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.lines, self.modules = lines, list(modules)

    def __enter__(self) -> Any:
        self._all_reduce = dist.all_reduce
        dist.all_reduce = self._watched_all_reduce
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        dist.all_reduce = self._all_reduce
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See `TorchDispatchMode`."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _SUMS:
            into = args[0] if name.endswith("_") or "foreach" in name else out
            if _is_narrow(into):
                self._note("sums", into)
        elif name in _CASTS:
            into, source = (out, args[0]) if name == "aten::_to_copy" else args[:2]
            if _is_narrow(into) and not _is_narrow(source):
                self._note("rounds", into)
        return out

    def _watched_all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **options: Any
    ) -> Any:
        # Operators of our own hide from the mode what they do.
        if _is_narrow(tensor) and op == dist.ReduceOp.SUM:
            self._note("sums", tensor)
        return self._all_reduce(tensor, op, *args, **options)

    def _note(self, what: str, into: Any) -> None:
        place, line = _place()
        if place == _GRADIENT and not (what == "sums" and self._is_gradient(into)):
            return  # of activations that several products read: as in one process
        if place:
            self.lines.setdefault((what, place), set()).add(line)

    def _is_gradient(self, tensor: Tensor) -> bool:
        """Whether this is a weight's gradient, of one that is used once: others are a sum."""
        named = [p for m in self.modules for _, p in m.named_parameters(remove_duplicate=False)]
        uses = Counter(map(id, named))
        own = local_tensor(tensor).data_ptr()
        grads = (p.grad for p in named if uses[id(p)] == 1 and p.grad is not None)
        return any(local_tensor(grad).data_ptr() == own for grad in grads)


def _is_narrow(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_narrow, value))
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _place() -> tuple[str, int]:
    """The innermost line of the package, past what only moves numbers; "" for a library's own."""
    frame = sys._getframe(3)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_ROOT):
            short = file.removeprefix(_ROOT)
            if short not in _BETWEEN:
                return f"{short} {frame.f_code.co_qualname}", frame.f_lineno
        elif file.endswith("torch/autograd/graph.py"):
            return _GRADIENT, 0
        elif any(library in file for library in _LIBRARIES):
            return "", 0  # by its policy, which is checked
        frame = frame.f_back  # type: ignore[assignment]
    return "", 0


def undeclared_lines(single: Lines, ranks: Sequence[Lines]) -> Mapping[str, tuple[int, ...]]:
    """What a layout rounds or sums in 16 bits that neither one process does nor the policy says.

    As sentences, each with the ranks.
    """
    told: dict[str, list[int]] = {}
    for rank, lines in enumerate(ranks):
        for (what, place), numbers in lines.items():
            extra = sorted(numbers - single.get((what, place), set()))
            if len(extra) > ROUNDED.get(f"{what} {place}", 0):
                at = ", ".join(map(str, extra)) if place != _GRADIENT else ""
                words = f"{place} {what} in 16 bits what the policy does not say" + (
                    f" (line {at})" if at else ""
                )
                told.setdefault(words, []).append(rank)
    return {words: tuple(who) for words, who in told.items()}
