"""Chat templates of strangers, rendered in a process that can be killed.

Jinja's sandbox keeps a template from the machine, but not from its time and memory: a loop in a
loop, a text doubled thirty times, braces nested a million deep. So a template runs in one child
process for each of ours, under a limit of memory, and is given a time for each answer; a child that
exceeds either is ended, and the error says so. A rendering costs a tenth of a millisecond more.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from shardwise.data.templates import Rendered, render_template
from shardwise.environment import clean_environment
from shardwise.errors import DataError

SECONDS = 10.0  # for one rendering
MEMORY = 1 << 29  # bytes of address space beyond what the child has at its start
_MAX_TEXT = 1 << 26  # bytes of an answer
_LENGTH = struct.Struct("<Q")


class _Child:
    """A process that renders what it is sent; ended when this one ends.

    Raises OSError or EOFError, with the reason, when it cannot be started.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shardwise.data.renderer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(
                PYTHONPATH=os.pathsep.join(filter(None, sys.path)), LC_ALL="C.UTF-8"
            ),
            cwd=Path("/"),
        )
        # An answer to nothing: once it is there the imports are done, whose time is not counted.
        assert self.process.stderr is not None
        with self.process.stderr as said:
            try:
                self.ask({}, 120.0)
            except (TimeoutError, EOFError) as error:
                self.end()
                lines = said.read().decode(errors="replace").split("\n")
                last = next((line for line in reversed(lines) if line.strip()), "")
                why = last or f"{type(error).__name__}, exit code {self.process.returncode}"
                raise EOFError(why[:500]) from error

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Raises TimeoutError, or EOFError when the child died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        data = json.dumps(request, default=lambda v: f"<{type(v).__name__}>").encode()
        deadline = time.monotonic() + seconds
        try:
            self.process.stdin.write(_LENGTH.pack(len(data)) + data)
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        answer: dict[str, Any] = json.loads(self._read(length, deadline))
        return answer

    def _read(self, length: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        handle, parts = self.process.stdout.fileno(), bytearray()
        while len(parts) < length:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise TimeoutError
            block = os.read(handle, min(length - len(parts), 1 << 20))
            if not block:
                raise EOFError
            parts += block
        return bytes(parts)

    def end(self) -> None:
        """Kill it; it holds nothing that could be lost."""
        self.process.kill()
        self.process.wait()


_child: _Child | None = None


def render_bounded(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Rendered:
    """`render_template` in the child. Raises DataError for whatever the template does wrong."""
    global _child
    request = {"source": source, "messages": list(messages), "variables": dict(variables)}
    if _child is None or _child.owner != os.getpid():  # a fork must not talk with our child
        _child = None
        try:
            _child = _Child()
        except (OSError, EOFError) as error:
            raise DataError(f"the template renderer could not be started: {error}") from error
    try:
        answer = _child.ask(request, SECONDS)
    except (TimeoutError, EOFError) as error:
        _child.end()
        _child = None
        if isinstance(error, TimeoutError):
            why = f"ran for more than {SECONDS:g} s"
        else:
            why = "ended the process that renders it (nested too deeply, or out of memory)"
        raise DataError(f"the chat template {why}; take another") from error
    if "error" in answer:
        raise DataError(answer["error"])
    return Rendered(answer["text"], [(start, end) for start, end in answer["marked"]])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if not request:
        return {}
    try:
        found = render_template(request["source"], request["messages"], request["variables"])
        if len(found.text) > _MAX_TEXT:
            raise MemoryError
        return found._asdict()
    except MemoryError:
        return {"error": f"the chat template needs more than {MEMORY >> 20} MiB; take another"}
    except RecursionError:
        return {"error": "the chat template does not parse: it is nested too deeply"}
    except Exception as error:
        return {"error": describe(error)}


def describe(error: Exception) -> str:
    """What went wrong, for an error of the data."""
    what = f"{type(error).__name__}: {error}"[:2000]
    if isinstance(error, SyntaxError) or type(error).__name__ == "TemplateSyntaxError":
        return f"the chat template does not parse: {what}"
    return f"the chat template failed: {what}"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """Answer requests until nobody asks any more."""
    with contextlib.suppress(OSError, ValueError):  # no such file: then by time alone
        _limit_memory()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while len(head := stdin.read(_LENGTH.size)) == _LENGTH.size:
        request = json.loads(stdin.read(_LENGTH.unpack(head)[0]))
        data = json.dumps(_answer(request)).encode()
        stdout.write(_LENGTH.pack(len(data)) + data)
        stdout.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
