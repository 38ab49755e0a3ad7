"""The environment of child processes that shall know nothing of ours."""

from __future__ import annotations

import os

# Where the loader finds libraries: module Pythons of clusters find even libpython by it.
_LOADER = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


def clean_environment(**given: str) -> dict[str, str]:
    """``given`` and what Python may need to start; nothing else, so no secrets."""
    return {name: os.environ[name] for name in _LOADER if name in os.environ} | given
