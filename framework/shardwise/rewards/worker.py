"""The sandboxed process that runs a user's reward function; standard library only.

Started by `user.py` as ``python worker.py FD SETTINGS``. It loads the user's file, takes its
limits upon itself, then answers one JSON line per item. Everything the function prints is thrown
away; the socket is the only way out.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import resource
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_module(name: str, path: Path) -> ModuleType:
    """Import one file under ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def take_limits(settings: dict[str, Any]) -> list[str]:
    """Limit this process for good; returns the names of the limits that hold."""
    allowed = {k: bool(settings[k]) for k in ("processes", "network", "writes")}
    memory = int(settings["memory_mb"]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    holding = ["memory", "cpu"]
    if not allowed["writes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        holding.append("file_size")
    seccomp = load_module("shardwise_seccomp", Path(__file__).with_name("seccomp.py"))
    if seccomp.install(**allowed):
        holding += [name for name, on in allowed.items() if not on] + ["signals"]
    elif not allowed["processes"]:
        # Weaker: counts threads too, and does not bind root.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        if os.getuid() != 0:
            holding.append("processes")
    return holding


def allow_cpu(seconds: float) -> None:
    """Let this process use ``seconds`` more CPU time before it is killed."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def check(function: Any, name: str) -> None:
    """Refuse, with TypeError, what can never give a score."""
    how = f"it is called as {name}(question, completion, answer, meta) and returns a number"
    if not callable(function):
        raise TypeError(f"{name} is a {type(function).__name__}, not a function: {how}")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is async: write 'def {name}'; {how}")
    if inspect.isgeneratorfunction(function):
        raise TypeError(f"{name} yields: write 'return'; {how}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions may have none
        return
    try:
        signature.bind("", "", "", {})
    except TypeError:
        raise TypeError(f"{name} takes {signature}: {how}") from None


def call(function: Any, item: dict[str, Any]) -> dict[str, Any]:
    """One item's answer: a number, which may be infinite, or the reason why there is none."""
    try:
        value = function(item["question"], item["completion"], item["answer"], item["meta"])
        if value is None:
            reason = "the reward function returned None"
        elif isinstance(value, (str, bytes, bytearray)):
            reason = f"the reward function returned a {type(value).__name__}: {value[:60]!r}"
        else:
            return {"value": float(value), "reason": ""}
    except MemoryError:
        reason = "out of memory"
    except BaseException as e:  # SystemExit and KeyboardInterrupt of a function end no worker
        reason = describe(e)
    return {"value": None, "reason": reason}


def describe(error: BaseException) -> str:
    """An error in a line, even one that cannot say what it is."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    return f"{type(error).__name__}: {text}"[:500].removesuffix(": ")


def main() -> None:
    """Serve until the socket closes."""
    pipe = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    lines = pipe.makefile("r", encoding="utf-8", newline="\n")
    parent = load_module("shardwise_seccomp", Path(__file__).with_name("seccomp.py"))
    parent.die_with_parent()
    path = Path(settings["path"])
    try:
        sys.path.insert(0, str(path.parent))
        allow_cpu(settings["start_timeout_s"])
        function = getattr(load_module("shardwise_user_reward", path), settings["name"])
        check(function, settings["name"])
        ready: dict[str, Any] = {"ready": take_limits(settings)}
    except BaseException as e:
        ready = {"error": f"{type(e).__name__}: {e}"[:2000]}
    pipe.sendall(json.dumps(ready).encode() + b"\n")
    if "error" in ready:
        return
    for line in lines:
        allow_cpu(settings["timeout_s"])
        answer = call(function, json.loads(line))
        pipe.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
