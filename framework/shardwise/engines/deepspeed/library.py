"""The one place that imports deepspeed (Rasley et al. 2020), and says which releases it trusts."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from shardwise.engines.deepspeed import user_config
from shardwise.engines.deepspeed.config import DeepSpeedConfig
from shardwise.errors import ConfigError

MEND = "pip install 'shardwise[deepspeed]'"
# The first release whose sums were compared with the oracle's by the tests, and came out right.
FIRST = (0, 19, 8)
_SILENT_S = 900.0  # longer than any of its files takes to compile


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


def nvme_folder(config: DeepSpeedConfig) -> tempfile.TemporaryDirectory[str] | None:
    """This rank's own folder under ``engine.nvme_path``; None if nothing goes there.

    Its own, because the library's names of files are the same in every run. Removed when it is no
    longer used, and at the process's end. Raises ConfigError where the path or libaio is missing,
    or a build of what needs it was killed.
    """
    devices = [user_config.device_of(config, k) for k in ("offload_optimizer", "offload_param")]
    if "nvme" not in devices:
        return None
    builder: Any = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ConfigError(
            "engine.offload_optimizer, offload_param: nvme: DeepSpeed builds its asynchronous "
            "reads with libaio and a C++ compiler, and one of them is missing; apt-get install "
            "libaio-dev g++, or write cpu"
        )
    check_build(builder.name)
    try:
        return tempfile.TemporaryDirectory(prefix="shardwise-", dir=config.nvme_path)
    except OSError as error:
        raise ConfigError(
            f"engine.nvme_path: {config.nvme_path}: {error.strerror}; name a folder on this "
            "node's NVMe disk that may be written"
        ) from None


def check_build(name: str) -> None:
    """Raise ConfigError if whoever built an operator was killed: PyTorch waits without end."""
    extensions: Any = importlib.import_module("torch.utils.cpp_extension")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or extensions.get_default_build_root())
    for lock in root.glob(f"**/{name}/lock"):
        try:
            silent = time.time() - max(f.stat().st_mtime for f in (lock, *lock.parent.glob("*.o")))
        except FileNotFoundError:  # whoever builds goes on, or is done
            continue
        if silent > _SILENT_S:
            raise ConfigError(
                f"{lock}: a build of DeepSpeed's {name} began and wrote nothing for "
                f"{silent / 60:.0f} minutes, so it was killed; delete this file"
            )


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
