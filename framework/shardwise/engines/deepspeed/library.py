"""The one place that imports deepspeed (Rasley et al. 2020), and says which releases it trusts."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import warnings
from typing import Any

from shardwise.errors import ConfigError

MEND = "pip install 'shardwise[deepspeed]'"
# The first release whose sums were compared with the oracle's by the tests, and came out right.
FIRST = (0, 19, 8)


def version() -> str | None:
    """That of the installed package; None: there is none."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    try:
        return importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        return None


def untrusted(found: str) -> str | None:
    """Why a release's sums cannot be trusted; None: they can."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    if numbers < FIRST:
        first = ".".join(map(str, FIRST))
        return f"deepspeed {found} is older than {first}, the first whose sums were checked; {MEND}"
    return None


@functools.cache
def load(device: str) -> Any:
    """The package, on the accelerator of that name.

    Raises ConfigError where it is missing, cannot be imported or is not to be trusted.
    """
    found = version()
    if found is None:
        raise ConfigError(f"engine.kind: deepspeed needs the package deepspeed; {MEND}")
    if why := untrusted(found):
        raise ConfigError(f"engine.kind: deepspeed: {why}")
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when it is imported
    try:
        library = importlib.import_module("deepspeed")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise ConfigError(f"engine.kind: deepspeed {found} cannot be imported ({error})") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch gives up; each call would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d")
    # Without ZeRO in bf16 it prints the machine's memory at every turn.
    for module in ("bf16_optimizer", "zero.stage_1_and_2", "zero.stage3"):
        there: Any = importlib.import_module(f"deepspeed.runtime.{module}")
        there.see_memory_usage = lambda *_, **__: None
    if device == "cpu":
        # On CPUs it compiles a collective of its own at its first start, for minutes; gloo has one.
        comm: Any = importlib.import_module("deepspeed.comm.torch")
        comm.build_shm_op = lambda: None
    return library
