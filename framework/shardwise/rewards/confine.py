"""Linux namespaces, Landlock, capabilities and limits for the sandbox; by ctypes, no library.

Every function here returns "" when what it does holds, else why it does not. Standard library
only: the worker loads this file by path. Constants are the kernel's stable ABI.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 2, 4, 8, 0x4000, 0x40000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 38, 47
# The same numbers on every architecture that has them.
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446
CAPSET = {"x86_64": 126, "aarch64": 91}


SCRATCH = "/dev/shm"


def _errno(result: int) -> str:
    return "" if result >= 0 else os.strerror(ctypes.get_errno())


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def namespaces(network: bool) -> str:
    """New namespaces for what comes next; children are in a new one of processes."""
    libc = _libc()
    flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    flags |= 0 if network else CLONE_NEWNET
    uid, gid = os.geteuid(), os.getegid()
    if not (error := _errno(libc.unshare(flags | CLONE_NEWUSER))):
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            try:
                Path(f"/proc/self/{name}").write_text(text)
            except OSError as e:
                return f"/proc/self/{name}: {e.strerror}"
        return ""
    return error if _errno(libc.unshare(flags)) else ""  # root needs no namespace of users


def own_view(writes: bool) -> str:
    """Mounts of our own: /proc of this namespace only, and, without ``writes``, nothing to write.

    To be called in the first process of a new namespace of processes.
    """
    libc = _libc()
    if error := _errno(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)):
        return f"private mounts: {error}"
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
    for kind in (b"proc", b"tmpfs"):  # where /proc may not be mounted, an empty folder hides it
        if not (error := _errno(libc.mount(kind, b"/proc", kind, flags, None))):
            break
    else:
        return f"/proc: {error}"
    if not writes:
        read_only = ctypes.create_string_buffer(struct.pack("QQQQ", 1, 0, 0, 0), 32)
        libc.syscall(MOUNT_SETATTR, -100, b"/", 0x8000, read_only, ctypes.c_size_t(32))
        # Libraries that look for a folder that they might write to find this one.
        libc.mount(b"tmpfs", SCRATCH.encode(), b"tmpfs", flags, b"size=1m")
    return ""


def drop_capabilities(machine: str) -> str:
    """Give up every capability, for good."""
    libc = _libc()
    word = ctypes.c_ulong
    error = _errno(libc.prctl(PR_SET_NO_NEW_PRIVS, word(1), word(0), word(0), word(0)))
    libc.prctl(PR_CAP_AMBIENT, word(4), word(0), word(0), word(0))  # clear all
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, word(capability), word(0), word(0), word(0))
    if machine not in CAPSET:
        return error or f"{machine} is not known here"
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    nothing = ctypes.create_string_buffer(24)
    return error or _errno(libc.syscall(CAPSET[machine], header, nothing))


def landlock(readable: Iterable[Path], *, writes: bool, processes: bool, network: bool) -> str:
    """Only ``readable`` may be read, nothing written, no TCP or abstract socket reached."""
    libc = _libc()
    abi = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        return _errno(abi)
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    read, execute = 0b1100, 0b1
    files = 0 if writes else everything
    sockets = 0b11 if abi >= 4 and not network else 0
    scopes = 0b11 if abi >= 6 else 0  # abstract sockets and signals stay inside
    attributes = struct.pack("QQQ", files, sockets, scopes)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        return _errno(ruleset)
    allowed = read | (execute if processes else 0)
    try:
        for path in readable if files else ():
            with contextlib.suppress(OSError):
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rights = allowed if path.is_dir() else allowed & ~0b1000
                rule = struct.pack("=Qi", rights, place)
                libc.syscall(LANDLOCK_ADD, ruleset, 1, rule, ctypes.c_uint32(0))
                os.close(place)
        return _errno(libc.syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0)))
    finally:
        os.close(ruleset)


def readable_paths(own: Sequence[str], processes: bool, network: bool) -> list[Path]:
    """Where Python and its libraries live, and ``own``: what a reward may read."""
    system = ["/usr", "/lib", "/lib64", "/opt", "/etc/ld.so.cache", "/etc/localtime"]
    system += ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random", "/sys/devices/system/cpu"]
    system += ["/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory"]
    if processes:
        system += ["/bin", "/sbin"]
    if network:
        names = ("resolv.conf", "hosts", "nsswitch.conf", "host.conf", "gai.conf", "ssl", "pki")
        system += [f"/etc/{name}" for name in (*names, "ca-certificates", "services", "protocols")]
        system += ["/run/systemd/resolve", "/var/lib/ca-certificates"]
    # This package by its folder: where it was installed to be edited, it is on no path.
    package = Path(__file__).resolve().parents[1]
    python = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path, str(package)]
    # A prefix that holds the whole system, or a home, would hold too much.
    found = [Path(p).resolve() for p in (*system, *python, *own) if p]
    return [p for p in dict.fromkeys(found) if p != Path("/") and p.exists()]


def limits(memory_mb: int, *, writes: bool) -> str:
    """Memory, files, core dumps: what may be used at most."""
    size = memory_mb * 2**20
    wanted = [(resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 256)]
    wanted += [(resource.RLIMIT_MEMLOCK, 0), (resource.RLIMIT_MSGQUEUE, 0)]
    if not writes:
        wanted.append((resource.RLIMIT_FSIZE, 0))
    for which, value in wanted:
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError) as e:
            return str(e)
    return ""
