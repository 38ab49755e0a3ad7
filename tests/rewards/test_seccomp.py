"""The hand-made seccomp filter, run by a small interpreter: it allows what is named, no more."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.rewards import seccomp

HEADERS = {
    "x86_64": [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")],
    "aarch64": [Path("/usr/include/asm-generic/unistd.h")],
}
FLAGS = ("reads", "writes", "processes", "network")
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
machines = pytest.mark.parametrize("machine", list(seccomp.TABLES))


def verdict(machine: str, program: bytes, call: int | str, *arguments: int, arch: int = 0) -> int:
    """What the kernel does: struct seccomp_data is number, architecture, pointer, arguments."""
    architecture, calls = seccomp.TABLES[machine]
    number = call if isinstance(call, int) else calls[call]
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch or architecture, 0, *padded)
    code = list(struct.iter_unpack("<HBBI", program))
    at = value = 0
    while True:
        op, yes, no, k = code[at]
        if op == 0x06:
            return int(k)
        if op == 0x20:
            value, at = struct.unpack_from("<I", data, k)[0], at + 1
            continue
        holds = {0x15: value == k, 0x35: value >= k, 0x45: bool(value & k)}[op]
        at += 1 + (yes if holds else no)


def program(machine: str, loading: bool, *flags: str) -> bytes:
    made = seccomp.build_filter(machine, loading, **dict.fromkeys(flags, True))  # type: ignore[arg-type]
    assert made is not None and len(made) // 8 < 4096  # the kernel's limit
    return made


@machines
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6))
def test_what_is_not_named_is_refused(machine: str, call: int, arguments: list[int]) -> None:
    found = verdict(machine, program(machine, False), call, *arguments)
    named = {seccomp.TABLES[machine][1].get(n) for n in seccomp.SCORING.split()}
    assert found in (EPERM, ENOSYS) or (found == ALLOW and call in named)


@machines
@pytest.mark.parametrize("loading", [False, True])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
def test_some_calls_are_never_allowed(machine: str, loading: bool, flags: tuple[bool, ...]) -> None:
    on = [name for name, flag in zip(FLAGS, flags, strict=True) if flag]
    made = program(machine, loading, *on)
    calls = seccomp.TABLES[machine][1]
    for name in ("clone3", "openat2"):
        assert verdict(machine, made, name) == ENOSYS
    assert verdict(machine, made, "prlimit64", 1) == EPERM
    for which, name, argument, value in (
        ("processes", "clone", 0, 0x10000000), ("", "fcntl", 1, 8), ("", "ioctl", 1, 0x5412),
        ("", "prctl", 0, 4), ("", "socket", 0, 1),
    ):  # fmt: skip
        arguments = [0] * 6
        arguments[argument] = value
        assert verdict(machine, made, name, *arguments) == EPERM, (which, name)
    assert verdict(machine, made, 0, arch=0x40000003) == KILL, "another architecture's numbers"
    if machine == "x86_64":
        assert verdict(machine, made, 0x40000000 | calls["read"]) == EPERM
    opened = verdict(machine, made, "openat", 0, 0, 0o102)
    assert opened == (ALLOW if "writes" in on else EPERM)
    code = verdict(machine, made, "mmap", 0, 0, 4)
    assert code == (ALLOW if loading or on else EPERM), "code is mapped only where files are read"
    new = verdict(machine, made, "clone", 0x11)
    assert new == (ALLOW if loading or "processes" in on else EPERM)
    assert verdict(machine, made, "execve") == (ALLOW if "processes" in on else EPERM)
    reached = verdict(machine, made, "socket", 2)
    assert reached == (ALLOW if "network" in on else EPERM)


@machines
def test_the_loader_allows_what_a_scorer_does(machine: str) -> None:
    for number in seccomp.TABLES[machine][1].values():
        if verdict(machine, program(machine, False), number) == ALLOW:
            assert verdict(machine, program(machine, True), number) == ALLOW


@machines
def test_numbers_are_the_kernels(machine: str) -> None:
    headers = [h for h in HEADERS[machine] if h.exists()]
    if not headers:
        pytest.skip("no kernel headers for this machine")
    text = "\n".join(h.read_text() for h in headers)
    known = {n: int(v) for n, v in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    wrong = {n for n, v in seccomp.TABLES[machine][1].items() if known.get(n, v) != v}
    assert not wrong
    groups = (seccomp.SCORING, seccomp.READING, seccomp.LOADING, seccomp.WRITING)
    names = {n for g in (*groups, seccomp.PROCESSES, seccomp.NETWORK) for n in g.split()}
    assert not (names & known.keys()) - seccomp.TABLES[machine][1].keys()


def test_unknown_machines_have_no_filter() -> None:
    assert seccomp.build_filter("pdp11", False) is None
