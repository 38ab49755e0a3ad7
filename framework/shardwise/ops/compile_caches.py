"""Where torch.compile and Triton keep what they built, and whether it can be trusted.

Both load code, and pickles, from their caches. torch's default lies in the temporary folder under a
name that anybody can guess and make first. So a default that is not ours alone is replaced by a
folder of our cache; a path that the user has set is the user's word and stays.
"""

from __future__ import annotations

import functools
import getpass
import logging
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import NamedTuple

from shardwise import safe_files

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """A folder, why it is this one, and whether it stands in for the library's default."""

    folder: Path
    detail: str
    instead: bool = False


@functools.cache
def secure() -> None:
    """Set what `places` says, before something is compiled. Once a process."""
    for variable, place in places().items():
        if place.instead:
            try:
                folder = safe_files.private_folder(place.folder.name)
            except OSError:  # no cache is ours: one for this process
                folder = Path(tempfile.mkdtemp(prefix=f"{place.folder.name}-"))
            os.environ[variable] = str(folder)
            log.warning("%s=%s: %s", variable, folder, place.detail)
        elif variable == "TORCHINDUCTOR_CACHE_DIR" and not os.environ.get(variable):
            place.folder.mkdir(mode=0o700, exist_ok=True)  # before anybody else does


def places() -> dict[str, Place]:
    """By environment variable; for `secure` and ``shardwise doctor``."""
    user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())  # as torch spells it
    triton = Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")
    return {
        "TORCHINDUCTOR_CACHE_DIR": _place(
            "TORCHINDUCTOR_CACHE_DIR", Path(tempfile.gettempdir(), f"torchinductor_{user}")
        ),
        "TRITON_CACHE_DIR": _place("TRITON_CACHE_DIR", triton),
    }


def _place(variable: str, default: Path) -> Place:
    given = os.environ.get(variable)
    if given and Path(given) != default:  # torch itself sets the variable to its default
        shared = _reason_against(Path(given))
        return Place(Path(given), f"as set; beware: {shared}" if shared else "as set")
    if reason := _reason_against(default):
        own = safe_files.cache_root() / variable.split("_")[0].lower()
        return Place(own, f"in place of the default: {reason}", instead=True)
    return Place(default, "the default, which only we can write")


def _reason_against(folder: Path) -> str | None:
    """Why others may put files into ``folder``, or make it first."""
    above = folder.parent
    try:
        if (reason := safe_files.distrust(folder)) is not None:
            return reason
    except FileNotFoundError:
        pass
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if not above.exists():
        return None
    mode = above.stat().st_mode
    # In a sticky folder nobody can rename what is another's.
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not mode & stat.S_ISVTX:
        return f"{above} can be written by others"
    return None
