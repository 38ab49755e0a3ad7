"""Front pages of packages whose names are imported when they are first used.

So ``from package import name`` costs only the module that holds it, and a command that needs no
tensors never imports torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any


def attach(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package (PEP 562); ``names``: by submodule."""
    home = {name: module for module, held in names.items() for name in held}

    def getattr_(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{home[name]}"), name)

    return getattr_, lambda: sorted(home)


class _CallableRoom(ModuleType):
    of_room: str  # module:function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See the function that the room is for."""
        module, _, name = self.of_room.partition(":")
        return getattr(importlib.import_module(module), name)(*args, **kwargs)


def callable_room(package: str, function: str) -> None:
    """Let a room be called like the function (``module:function``) whose name it has."""
    room = sys.modules[package]
    room.__class__ = _CallableRoom
    vars(room)["of_room"] = function
