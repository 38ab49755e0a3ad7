"""A Python like those of cluster modules."""

from __future__ import annotations

import sys
from pathlib import Path


def module_python(folder: Path) -> str:
    """An interpreter that starts only where LD_LIBRARY_PATH names ``folder``."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\n[ "$LD_LIBRARY_PATH" = "{folder}" ] && exec "{sys.executable}" "$@"\n'
        'echo "python: error while loading: libpython.so: cannot open shared object" >&2\n'
        "exit 127\n"
    )
    path.chmod(0o755)
    return str(path)
