"""The sandboxed processes that run a user's reward function; standard library only.

Started by `user.py` as ``python worker.py FD SETTINGS``, with nothing of the trainer: a fresh
program, its own environment, one socket. Three kinds of processes:

- the *starter* makes namespaces, forks once and waits;
- the *loader*, confined, imports the user's file, then forks *scorers* when it is told to;
- a *scorer* closes the last filter behind itself and answers one JSON line an item.

Everything that they print is thrown away; the sockets are the only way out.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import platform
import resource
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
# What functions and the standard library itself import late, when a scorer may not any more.
PRELOADED = """
    _strptime abc ast base64 bisect calendar cmath collections.abc copy dataclasses datetime
    decimal difflib encodings.ascii encodings.idna encodings.latin_1 encodings.punycode
    encodings.unicode_escape encodings.utf_16 encodings.utf_32 enum fractions functools hashlib
    heapq html.parser io itertools json keyword linecache locale math numbers operator random re
    secrets statistics string struct textwrap time timeit token tokenize traceback types typing
    unicodedata urllib.parse uuid warnings weakref zlib
"""
MEND = (
    "refused by the sandbox: read files and import modules where the file is imported (`preload` "
    "names modules), or allow `reads`, `writes`, `processes` or `network` of this reward"
)


def load_module(name: str, path: Path) -> ModuleType:
    """Import one file under ``name``."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


seccomp = load_module("shardwise_seccomp", HERE / "seccomp.py")
confine = load_module("shardwise_confine", HERE / "confine.py")


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
    except BaseException as e:  # SystemExit and KeyboardInterrupt of a function end no scorer
        reason = describe(e)
    return {"value": None, "reason": reason}


def describe(error: BaseException) -> str:
    """An error in a line, even one that cannot say what it is."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    refused = isinstance(error, (PermissionError, ImportError)) or "new thread" in text
    line = f"{type(error).__name__}: {text}"[:500].removesuffix(": ")
    return f"{line[:100]} ({MEND})" if refused else line


# --- the scorer ----------------------------------------------------------------------------------


def scorer(fd: int, function: Any, settings: dict[str, Any]) -> NoReturn:
    """Serve one socket until it closes; never returns to the loader's code."""
    with contextlib.suppress(BaseException):
        seccomp.die_with_parent()
        if settings["processes"]:
            os.setpgid(0, 0)  # to be killed with all its children
        os.dup2(fd, 3)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        why = "" if settings["open"] else seccomp.install(False, **settings["allowed"])
        answer({"error": why} if why else {"ready": True})
        if not why:
            serve(function)
    os._exit(0)


def answer(message: dict[str, Any]) -> None:
    """One line to the trainer."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(3, data) :]


def serve(function: Any) -> None:
    """Answer items, each with its own token, until the trainer closes the socket."""
    buffer = b""
    while data := os.read(3, 1 << 16):
        buffer += data
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            item = json.loads(line)
            token = item.pop("token")
            answer(call(function, item) | {"token": token})


# --- the loader ----------------------------------------------------------------------------------


def confined(settings: dict[str, Any], separate: str) -> dict[str, str]:
    """Confine this process before it imports anything of the user's; what does not hold, and why.

    ``separate``: why there are no namespaces, "" when there are.
    """
    if platform.system() != "Linux":
        return {"seccomp": f"{platform.system()} has none"}
    allowed = settings["allowed"]
    rights = {k: allowed[k] for k in ("writes", "processes", "network")}
    readable = confine.readable_paths(settings["folders"], rights["processes"], rights["network"])
    lacking = {
        "namespaces": separate or confine.own_view(rights["writes"]),
        "capabilities": confine.drop_capabilities(platform.machine()),
        "limits": confine.limits(settings["memory_mb"], writes=rights["writes"]),
        "landlock": confine.landlock(readable, **rights),
        "seccomp": seccomp.install(True, **allowed),
    }
    return {name: why for name, why in lacking.items() if why}


def load(settings: dict[str, Any]) -> Any:
    """The user's function, and all modules that it may need once the last filter is closed."""
    path = Path(settings["path"])
    if path.parent != HERE:  # the folder of this file must not shadow modules
        sys.path.insert(0, str(path.parent))
    for name in PRELOADED.split():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for name in settings["preload"]:
        importlib.import_module(name)
    function = getattr(load_module("shardwise_user_reward", path), settings["name"])
    check(function, settings["name"])
    return function


def loader(control: socket.socket, settings: dict[str, Any], separate: str) -> NoReturn:
    """Import, then fork a scorer for each socket that the trainer sends."""
    try:
        seccomp.die_with_parent()
        lacking = confined(settings, separate)
        if lacking.keys() & {"seccomp", "capabilities"} and settings["required"]:
            tell(control, {"lacking": lacking})
            os._exit(1)
        settings["open"] = "seccomp" in lacking
        function = load(settings)
        tell(control, {"lacking": lacking, "ready": True})
    except BaseException as e:
        tell(control, {"error": describe(e)})
        os._exit(1)
    with contextlib.suppress(BaseException):
        while True:
            message, sockets, _, _ = socket.recv_fds(control, 64, 1)
            if message == b"fork":
                if (pid := os.fork()) == 0:
                    scorer(sockets[0], function, settings)
                os.close(sockets[0])
                tell(control, {"pid": pid})
            elif message.startswith(b"reap "):
                code = os.waitstatus_to_exitcode(os.waitpid(int(message[5:]), 0)[1])
                tell(control, {"ended": f"signal {-code}" if code < 0 else f"exit code {code}"})
            else:
                break
    os._exit(0)


def tell(control: socket.socket, message: dict[str, Any]) -> None:
    """One packet to the trainer."""
    control.send(json.dumps(message).encode()[:60000])


def main() -> None:
    """The starter."""
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    seccomp.die_with_parent()
    separate = ""
    if platform.system() == "Linux":
        separate = confine.namespaces(settings["allowed"]["network"])
    if (pid := os.fork()) == 0:
        loader(control, settings, separate)
    control.close()
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


if __name__ == "__main__":
    main()
