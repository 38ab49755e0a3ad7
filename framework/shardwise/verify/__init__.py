"""`shardwise verify`: a layout against one process, on the user's own recipe made small.

The room can be called like the function it is for: ``shardwise.verify(recipe, ["dp2.tp2.sp"])``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `shardwise.verify.run.verify`."""
        from shardwise.verify import server

        with server.importing():
            from shardwise.verify.run import verify

        return verify(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
