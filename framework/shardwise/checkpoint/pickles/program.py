"""What a pickle would build, as JSON, in a process that can do nothing; standard library only.

Started by `archive.py` as ``python program.py``: pickles come on stdin, each behind its length in 8
bytes, and one JSON answer each goes to stdout in the same form. The first answer says what of the
sandbox does not hold (`rewards.worker`); where it is more than this may miss, it is the last.

No pickle is ever run: its instructions are listed (`pickletools`) and those that build data
are followed here. A class or a function is its name, a call is a note of what was to be called.
"""

from __future__ import annotations

# What decoding imports late, when no file may be opened any more.
import encodings.ascii
import encodings.latin_1
import encodings.raw_unicode_escape  # noqa: F401
import importlib.util
import json
import os
import pickletools
import platform
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parents[2] / "rewards" / "worker.py"
MEMORY_MB = 8192
VALUES_PER_BYTE = 10  # few references to references can stand for more values than any memory
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING"),
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
BYTES = {
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
EMPTY = {"EMPTY_LIST": "list", "EMPTY_DICT": "dict", "EMPTY_SET": "set", "EMPTY_TUPLE": "tuple"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Made:
    """A container, or what a call was to make: of what, from which arguments, with what in it."""

    def __init__(self, of: str, args: Any = None, items: list[Any] | None = None) -> None:
        self.of, self.args, self.state = of, args, None
        self.items: list[Any] = items or []
        self.pairs: list[list[Any]] = []


class Machine:
    """The stack and the memory of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under open marks
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """The value that is left. Raises ValueError for what is no pickle, or builds no data."""
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            self.step(name, argument)
        raise ValueError("no end")

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        push = self.stack.append
        if name in VALUES:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in BYTES:
            push(Made("bytes", len(argument)))
        elif name in EMPTY:
            push(Made(EMPTY[name]))
        elif name in TUPLES:
            items = [self.stack.pop() for _ in range(TUPLES[name])]
            push(Made("tuple", items=items[::-1]))
        elif name in ("TUPLE", "LIST", "FROZENSET"):
            items = self.marked()
            self.stack.append(Made(name.lower(), items=items))
        elif name == "DICT":
            made = Made("dict")
            made.pairs = pairs(self.marked())
            self.stack.append(made)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self.stack.pop()] if name == "APPEND" else self.marked()
            self.made().items += items
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take(2) if name == "SETITEM" else self.marked()
            self.made().pairs += pairs(items)
        elif "PUT" in name or name == "MEMOIZE":
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif "GET" in name:
            push(self.memo[argument])
        else:
            self.call(name, argument)

    def call(self, name: str, argument: Any) -> None:
        """Note what was to be looked up, called or set."""
        push = self.stack.append
        if name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name == "POP_MARK":
            self.marked()
        elif name == "POP":
            self.stack.pop() if self.stack else self.marked()
        elif name == "DUP":
            push(self.stack[-1])
        elif name == "GLOBAL":
            push(Made("name", ".".join(argument.split(" "))))
        elif name == "STACK_GLOBAL":
            push(Made("name", ".".join(map(str, self.take(2)))))
        elif name == "INST":
            args = self.marked()
            self.stack.append(Made(argument.replace(" ", "."), Made("tuple", items=args)))
        elif name == "OBJ":
            of, *args = self.marked()
            self.stack.append(Made(named(of), Made("tuple", items=args)))
        elif name in ("REDUCE", "NEWOBJ"):
            of, args = self.take(2)
            push(Made(named(of), args))
        elif name == "NEWOBJ_EX":
            of, args, _ = self.take(3)
            push(Made(named(of), args))
        elif name == "BUILD":
            state = self.stack.pop()
            self.made().state = state
        elif name == "BINPERSID":
            push(Made("kept elsewhere", self.stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its instruction {name} builds no data")

    def take(self, number: int) -> list[Any]:
        """The topmost values, the last one last."""
        return [self.stack.pop() for _ in range(number)][::-1]

    def marked(self) -> list[Any]:
        """All above the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def made(self) -> Made:
        """What is filled."""
        found = self.stack[-1]
        if not isinstance(found, Made):
            raise ValueError(f"it fills a {type(found).__name__}")
        return found


def pairs(items: list[Any]) -> list[list[Any]]:
    """Of keys and values in turn."""
    return [[items[i], items[i + 1]] for i in range(0, len(items), 2)]


def named(of: Any) -> str:
    """Of what was to be called."""
    return str(of.args) if isinstance(of, Made) and of.of == "name" else "something unnamed"


class Writer:
    """Values as JSON's own, and objects for those that JSON has not."""

    def __init__(self, most: int) -> None:
        self.left = most

    def encode(self, value: Any) -> Any:
        """Raises ValueError for more values than anybody writes in so few bytes."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"it stands for more than {VALUES_PER_BYTE} values for each byte")
        if not isinstance(value, Made):
            return value
        found: dict[str, Any] = {"of": value.of}
        if value.args is not None:
            found["args"] = self.encode(value.args)
        if value.state is not None:
            found["state"] = self.encode(value.state)
        if value.items:
            found["items"] = [self.encode(item) for item in value.items]
        if value.pairs:
            found["pairs"] = [[self.encode(k), self.encode(v)] for k, v in value.pairs]
        return found


def answer(data: bytes) -> bytes:
    """JSON of ``value``, or of the ``error`` that says why there is none."""
    try:
        found = {"value": Writer(VALUES_PER_BYTE * len(data)).encode(Machine().run(data))}
        return json.dumps(found).encode()
    except RecursionError:
        why = "it is nested too deeply"
    except MemoryError:
        why = f"it needs more than {MEMORY_MB} MiB"
    except (ValueError, LookupError, TypeError, AttributeError, UnicodeError) as error:
        why = f"{type(error).__name__}: {error}"
    return json.dumps({"error": why[:500]}).encode()


def receive(size: int) -> bytes:
    """So many bytes of stdin, fewer at its end."""
    parts = []
    while size and (part := os.read(0, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(data: bytes) -> None:
    """One answer."""
    whole = memoryview(len(data).to_bytes(8, "little") + data)
    while whole:
        whole = whole[os.write(1, whole) :]


def serve(worker: Any, separate: str) -> None:
    """Close the sandbox behind this process, then answer until stdin ends."""
    worker.seccomp.die_with_parent()
    rights = dict.fromkeys(("reads", "writes", "processes", "network"), False)
    settings = {"allowed": rights, "folders": [], "memory_mb": MEMORY_MB}
    lacking = worker.confined(settings, separate)
    if "seccomp" not in lacking and (why := worker.seccomp.install(False)):
        lacking["seccomp"] = why
    send(json.dumps({"lacking": lacking}).encode())
    if lacking.keys() & {"seccomp", "capabilities"}:
        return
    while len(length := receive(8)) == 8:
        send(answer(receive(int.from_bytes(length, "little"))))


def main() -> None:
    """As `rewards.worker`: make namespaces, fork once into them, wait."""
    spec = importlib.util.spec_from_file_location("shardwise_worker", WORKER)
    assert spec is not None and spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    worker.seccomp.die_with_parent()
    separate = worker.confine.namespaces(False) if platform.system() == "Linux" else ""
    if (pid := os.fork()) == 0:
        try:
            serve(worker, separate)
        finally:
            os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)


if __name__ == "__main__":
    sys.setrecursionlimit(2000)
    main()
