"""The hand-made seccomp filter: its jumps stay inside, its numbers are the kernel's."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import pytest

from shardwise.rewards import seccomp

HEADERS = {
    "x86_64": [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")],
    "aarch64": [Path("/usr/include/asm-generic/unistd.h")],
}
RENAMED = {"umount2": ("umount2", "umount")}


@pytest.mark.parametrize("machine", list(seccomp.TABLES))
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_every_path_ends_in_a_verdict(machine: str, flags: tuple[bool, bool, bool]) -> None:
    program = seccomp.build_filter(machine, processes=flags[0], network=flags[1], writes=flags[2])
    assert program is not None
    code = list(struct.iter_unpack("<HBBI", program))
    assert len(code) < 4096  # the kernel's limit
    for at, (op, yes, no, _) in enumerate(code):
        if op == 0x06:
            continue
        targets = [at + 1] if op == 0x20 else [at + 1 + yes, at + 1 + no]
        assert all(t < len(code) for t in targets)


@pytest.mark.parametrize("machine", list(seccomp.TABLES))
def test_numbers_are_the_kernels(machine: str) -> None:
    headers = [h for h in HEADERS[machine] if h.exists()]
    if not headers:
        pytest.skip("no kernel headers for this machine")
    text = "\n".join(h.read_text() for h in headers)
    known = {n: int(v) for n, v in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    for name, number in seccomp.TABLES[machine][1].items():
        found = {known[n] for n in RENAMED.get(name, (name,)) if n in known}
        assert not found or number in found, name


def test_unknown_machines_have_no_filter() -> None:
    assert seccomp.build_filter("pdp11", processes=False, network=False, writes=False) is None
