"""Linux limits for the sandboxed worker: a seccomp filter built by hand, no library, no privilege.

The filter is what makes the sandbox hold where resource limits do not: a fork bomb run by root
ignores RLIMIT_NPROC, and no resource limit covers the network, signals or deleting files.
Standard library only: the worker loads this file by path. Numbers are the kernel's stable ABI.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterable

EPERM, ENOSYS = 1, 38
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
CLONE_THREAD = 0x10000
OPEN_WRITES = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC


def _calls(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in (w.split("=") for w in text.split())}


# machine -> (audit architecture, {call: number}). Calls an architecture lacks are left out.
TABLES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        _calls(
            "clone=56 clone3=435 fork=57 vfork=58 execve=59 execveat=322 socket=41 connect=42 "
            "bind=49 listen=50 accept=43 accept4=288 kill=62 tkill=200 tgkill=234 "
            "rt_sigqueueinfo=129 rt_tgsigqueueinfo=297 pidfd_open=434 pidfd_send_signal=424 "
            "ptrace=101 process_vm_readv=310 process_vm_writev=311 prlimit64=302 setrlimit=160 "
            "setpriority=141 sched_setaffinity=203 setsid=112 unshare=272 setns=308 chroot=161 "
            "mount=165 umount2=166 bpf=321 perf_event_open=298 userfaultfd=323 "
            "io_uring_setup=425 memfd_create=319 shmget=29 reboot=169 open=2 openat=257 "
            "openat2=437 creat=85 truncate=76 rename=82 renameat=264 renameat2=316 mkdir=83 "
            "mkdirat=258 rmdir=84 link=86 linkat=265 unlink=87 unlinkat=263 symlink=88 "
            "symlinkat=266 mknod=133 mknodat=259 chmod=90 fchmod=91 fchmodat=268 fchmodat2=452 "
            "chown=92 fchown=93 lchown=94 fchownat=260"
        ),
    ),
    "aarch64": (
        0xC00000B7,
        _calls(
            "clone=220 clone3=435 execve=221 execveat=281 socket=198 connect=203 bind=200 "
            "listen=201 accept=202 accept4=242 kill=129 tkill=130 tgkill=131 "
            "rt_sigqueueinfo=138 rt_tgsigqueueinfo=240 pidfd_open=434 pidfd_send_signal=424 "
            "ptrace=117 process_vm_readv=270 process_vm_writev=271 prlimit64=261 setrlimit=164 "
            "setpriority=140 sched_setaffinity=122 setsid=157 unshare=97 setns=268 chroot=51 "
            "mount=40 umount2=39 bpf=280 perf_event_open=241 userfaultfd=282 io_uring_setup=425 "
            "memfd_create=279 shmget=194 reboot=142 openat=56 openat2=437 truncate=45 "
            "renameat=38 renameat2=276 mkdirat=34 linkat=37 unlinkat=35 symlinkat=36 mknodat=33 "
            "fchmod=52 fchmodat=53 fchmodat2=452 fchown=55 fchownat=54"
        ),
    ),
}

ALWAYS = (
    "kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal ptrace "
    "process_vm_readv process_vm_writev setpriority sched_setaffinity setsid unshare setns chroot "
    "mount umount2 bpf perf_event_open userfaultfd io_uring_setup memfd_create shmget reboot"
)
PROCESSES = "fork vfork execve execveat"
NETWORK = "socket connect bind listen accept accept4"
WRITES = (
    "creat truncate rename renameat renameat2 mkdir mkdirat rmdir link linkat unlink unlinkat "
    "symlink symlinkat mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat"
)

_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ARGUMENT = 16  # offset of the first argument in struct seccomp_data (low word: little endian)


def _instruction(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, k)


def _refuse(number: int, error: int = EPERM) -> list[bytes]:
    return [_instruction(_JEQ, number, 0, 1), _instruction(_RETURN, _ERRNO | error)]


def _refuse_argument(number: int, argument: int, code: int, k: int, if_set: bool) -> list[bytes]:
    """Refuse call ``number`` when ``argument code k`` equals ``if_set``; else allow it."""
    return [
        _instruction(_JEQ, number, 0, 4),
        _instruction(_LOAD, _ARGUMENT + 8 * argument),
        _instruction(code, k, 0 if if_set else 1, 1 if if_set else 0),
        _instruction(_RETURN, _ERRNO | EPERM),
        _instruction(_RETURN, _ALLOW),
    ]


def build_filter(machine: str, *, processes: bool, network: bool, writes: bool) -> bytes | None:
    """The BPF program; the flags say what stays allowed. None for an unknown machine."""
    if machine not in TABLES:
        return None
    architecture, calls = TABLES[machine]
    denied = ALWAYS.split()
    program = [
        _instruction(_LOAD, 4),
        _instruction(_JEQ, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, 0),
    ]
    if machine == "x86_64":  # the x32 alias of every call
        program += [_instruction(_JGE, 0x40000000, 0, 1), _instruction(_RETURN, _ERRNO | EPERM)]
    # clone3's flags lie behind a pointer, out of a filter's sight: libc falls back to clone.
    program += _refuse(calls["clone3"], ENOSYS) + _refuse(calls["openat2"], ENOSYS)
    # Limits may be read and changed for oneself only (the hard limits hold), as pid 0.
    program += _refuse_argument(calls["prlimit64"], 0, _JEQ, 0, if_set=False)
    if not processes:
        denied += PROCESSES.split()
        program += _refuse_argument(calls["clone"], 0, _JSET, CLONE_THREAD, if_set=False)
    if not network:
        denied += NETWORK.split()
    if not writes:
        denied += WRITES.split()
        program += _refuse_argument(calls["openat"], 2, _JSET, OPEN_WRITES, if_set=True)
        if "open" in calls:
            program += _refuse_argument(calls["open"], 1, _JSET, OPEN_WRITES, if_set=True)
    for name in denied:
        program += _refuse(calls[name]) if name in calls else []
    return b"".join([*program, _instruction(_RETURN, _ALLOW)])


def _prctl(arguments: Iterable[object]) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(*arguments) == 0)


def die_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent thread dies. False: not possible."""
    return platform.system() == "Linux" and _prctl(
        ctypes.c_ulong(v) for v in (PR_SET_PDEATHSIG, 9, 0, 0, 0)
    )


def install(*, processes: bool, network: bool, writes: bool) -> bool:
    """Put this process, for good, behind the filter. False where the kernel does not offer it."""
    if platform.system() != "Linux":
        return False
    program = build_filter(platform.machine(), processes=processes, network=network, writes=writes)
    if program is None:
        return False
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog { unsigned short len; struct sock_filter *filter; }
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    pointer = ctypes.create_string_buffer(header, len(header))
    word = ctypes.c_ulong
    return _prctl([word(PR_SET_NO_NEW_PRIVS), word(1), word(0), word(0), word(0)]) and _prctl(
        [word(PR_SET_SECCOMP), word(SECCOMP_MODE_FILTER), ctypes.byref(pointer), word(0), word(0)]
    )
