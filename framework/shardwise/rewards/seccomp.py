"""The sandbox's allow-list of system calls: a seccomp filter built by hand, without privilege.

Whatever is not named here is refused with EPERM, so a call that a future kernel adds is refused
too. Two filters hold one after the other: the process that imports a reward's file may read and
fork (`LOADING`), the processes that score may compute and answer (`SCORING`), and what a recipe
adds. Standard library only: the worker loads this file by path. Numbers are the kernel's ABI.
"""

from __future__ import annotations

import ctypes
import platform
import struct
from typing import Literal

EPERM, ENOSYS = 1, 38
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
OPEN_WRITES = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
PROT_EXEC = 4
CLONE_NEW = 0x7E020000  # every namespace


def _calls(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in (w.split("=") for w in text.split())}


# machine -> (audit architecture, {call: number}). Calls an architecture lacks are left out.
TABLES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        _calls(
            "read=0 write=1 readv=19 writev=20 close=3 futex=202 mmap=9 munmap=11 mremap=25 "
            "mprotect=10 brk=12 madvise=28 clock_gettime=228 clock_getres=229 gettimeofday=96 "
            "time=201 clock_nanosleep=230 nanosleep=35 getrandom=318 getpid=39 gettid=186 "
            "getppid=110 getuid=102 geteuid=107 getgid=104 getegid=108 getrusage=98 times=100 "
            "rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 sigaltstack=131 "
            "restart_syscall=219 setitimer=38 getitimer=36 alarm=37 pause=34 sched_yield=24 "
            "exit=60 exit_group=231 open=2 openat=257 stat=4 lstat=6 fstat=5 newfstatat=262 "
            "statx=332 access=21 faccessat=269 faccessat2=439 getdents=78 getdents64=217 "
            "readlink=89 readlinkat=267 lseek=8 pread64=17 preadv=295 ioctl=16 fcntl=72 dup=32 "
            "getcwd=79 statfs=137 fstatfs=138 uname=63 sysinfo=99 sched_getaffinity=204 "
            "getrlimit=97 prlimit64=302 fadvise64=221 clone=56 fork=57 set_robust_list=273 "
            "rseq=334 wait4=61 waitid=247 pipe=22 pipe2=293 dup2=33 dup3=292 poll=7 ppoll=271 "
            "select=23 pselect6=270 epoll_create=213 epoll_create1=291 epoll_ctl=233 "
            "epoll_wait=232 epoll_pwait=281 eventfd2=290 recvmsg=47 sendmsg=46 recvfrom=45 "
            "sendto=44 prctl=157 seccomp=317 setrlimit=160 arch_prctl=158 set_tid_address=218 "
            "getpgrp=111 getpgid=121 getsid=124 setpgid=109 getgroups=115 close_range=436 "
            "membarrier=324 creat=85 truncate=76 ftruncate=77 rename=82 renameat=264 "
            "renameat2=316 mkdir=83 mkdirat=258 rmdir=84 link=86 linkat=265 unlink=87 "
            "unlinkat=263 symlink=88 symlinkat=266 chmod=90 fchmod=91 fchmodat=268 "
            "utimensat=280 utime=132 utimes=235 fsync=74 fdatasync=75 fallocate=285 pwrite64=18 "
            "pwritev=296 flock=73 sendfile=40 copy_file_range=326 umask=95 chdir=80 fchdir=81 "
            "vfork=58 execve=59 mincore=27 socket=41 connect=42 bind=49 listen=50 accept=43 "
            "accept4=288 getsockname=51 getpeername=52 setsockopt=54 getsockopt=55 sendmmsg=307 "
            "recvmmsg=299 shutdown=48 clone3=435 openat2=437 futex_waitv=449"
        ),
    ),
    "aarch64": (
        0xC00000B7,
        _calls(
            "read=63 write=64 readv=65 writev=66 close=57 futex=98 mmap=222 munmap=215 "
            "mremap=216 mprotect=226 brk=214 madvise=233 clock_gettime=113 clock_getres=114 "
            "gettimeofday=169 clock_nanosleep=115 nanosleep=101 getrandom=278 getpid=172 "
            "gettid=178 getppid=173 getuid=174 geteuid=175 getgid=176 getegid=177 getrusage=165 "
            "times=153 rt_sigaction=134 rt_sigprocmask=135 rt_sigreturn=139 sigaltstack=132 "
            "restart_syscall=128 setitimer=103 getitimer=102 sched_yield=124 exit=93 "
            "exit_group=94 openat=56 fstat=80 newfstatat=79 statx=291 faccessat=48 "
            "faccessat2=439 getdents64=61 readlinkat=78 lseek=62 pread64=67 preadv=69 ioctl=29 "
            "fcntl=25 dup=23 getcwd=17 statfs=43 fstatfs=44 uname=160 sysinfo=179 "
            "sched_getaffinity=123 getrlimit=163 prlimit64=261 fadvise64=223 clone=220 "
            "set_robust_list=99 rseq=293 wait4=260 waitid=95 pipe2=59 dup3=24 ppoll=73 "
            "pselect6=72 epoll_create1=20 epoll_ctl=21 epoll_pwait=22 eventfd2=19 recvmsg=212 "
            "sendmsg=211 recvfrom=207 sendto=206 prctl=167 seccomp=277 setrlimit=164 "
            "set_tid_address=96 getpgid=155 getsid=156 setpgid=154 getgroups=158 "
            "close_range=436 membarrier=283 truncate=45 ftruncate=46 renameat=38 renameat2=276 "
            "mkdirat=34 linkat=37 unlinkat=35 symlinkat=36 fchmod=52 fchmodat=53 utimensat=88 "
            "fsync=82 fdatasync=83 fallocate=47 pwrite64=68 pwritev=70 flock=32 sendfile=71 "
            "copy_file_range=285 umask=166 chdir=49 fchdir=50 execve=221 mincore=232 socket=198 "
            "connect=203 bind=200 listen=201 accept=202 accept4=242 getsockname=204 "
            "getpeername=205 setsockopt=208 getsockopt=209 sendmmsg=269 recvmmsg=243 "
            "shutdown=210 clone3=435 openat2=437 futex_waitv=449"
        ),
    ),
}

# Compute, wait, read the clock, answer on what is open, end.
SCORING = (
    "read write readv writev close futex mmap munmap mremap mprotect brk madvise clock_gettime "
    "clock_getres gettimeofday time clock_nanosleep nanosleep getrandom getpid gettid getppid "
    "getuid geteuid getgid getegid getrusage times rt_sigaction rt_sigprocmask rt_sigreturn "
    "sigaltstack restart_syscall setitimer getitimer alarm pause sched_yield exit exit_group"
)
# Find and read files and modules.
READING = (
    "open openat stat lstat fstat newfstatat statx access faccessat faccessat2 getdents "
    "getdents64 readlink readlinkat lseek pread64 preadv ioctl fcntl dup getcwd statfs fstatfs "
    "uname sysinfo sched_getaffinity getrlimit prlimit64 fadvise64"
)
# Load libraries that start threads, fork, be told by the trainer, close the next filter.
LOADING = (
    "clone fork set_robust_list rseq wait4 waitid pipe pipe2 dup2 dup3 poll ppoll select "
    "pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 recvmsg "
    "sendmsg recvfrom sendto prctl seccomp setrlimit arch_prctl set_tid_address getpgrp getpgid "
    "getsid setpgid getgroups close_range membarrier"
)
WRITING = (
    "creat truncate ftruncate rename renameat renameat2 mkdir mkdirat rmdir link linkat unlink "
    "unlinkat symlink symlinkat chmod fchmod fchmodat utimensat utime utimes fsync fdatasync "
    "fallocate pwrite64 pwritev flock sendfile copy_file_range umask chdir fchdir"
)
PROCESSES = "vfork execve chdir fchdir umask mincore"
NETWORK = (
    "socket connect bind listen accept accept4 getsockname getpeername setsockopt getsockopt "
    "sendmmsg recvmmsg shutdown"
)
ABSENT = "clone3 openat2 futex_waitv"  # ENOSYS: the C library then takes an older call

# Calls that are allowed for some arguments: (which, "without" these bits or "one of" these).
Condition = tuple[int, Literal["without", "one of"], tuple[int, ...]]
_FCNTL = (0, 1, 2, 3, 4, 1030)  # descriptors and flags: not F_SETOWN, which sends signals
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # terminals' size, FIONREAD, FIOCLEX...
_PRCTL = (PR_SET_PDEATHSIG, 3, 15, 16, PR_SET_SECCOMP, 23, PR_SET_NO_NEW_PRIVS, 0x53564D41)
_READ_ONLY: Condition = (2, "without", (OPEN_WRITES,))
_NO_CODE: Condition = (2, "without", (PROT_EXEC,))
CONDITIONS: dict[str, Condition] = {
    "clone": (0, "without", (CLONE_NEW,)),
    "prlimit64": (0, "one of", (0,)),  # of this process
    "fcntl": (1, "one of", _FCNTL),
    "ioctl": (1, "one of", _IOCTL),
    "prctl": (0, "one of", _PRCTL),
    "socket": (0, "one of", (2, 10, 16)),  # IPv4, IPv6, netlink for name resolution; not Unix's
}

_LOAD, _JEQ, _JGE, _JSET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_ARGUMENT = 16  # offset of the first argument in struct seccomp_data (low word: little endian)


def _instruction(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, k)


def _allow(number: int, condition: Condition | None) -> list[bytes]:
    """Allow call ``number``, or refuse it where its argument does not meet the condition."""
    if condition is None:
        return [_instruction(_JEQ, number, 0, 1), _instruction(_RETURN, _ALLOW)]
    argument, how, values = condition
    load = _instruction(_LOAD, _ARGUMENT + 8 * argument)
    refuse, allow = _instruction(_RETURN, _ERRNO | EPERM), _instruction(_RETURN, _ALLOW)
    n = len(values)
    if how == "without":
        tests, verdicts = [_instruction(_JSET, sum(values), 1, 0)], [allow, refuse]
        n = 1
    else:
        tests = [_instruction(_JEQ, v, n - i, 0) for i, v in enumerate(values)]
        verdicts = [refuse, allow]
    return [_instruction(_JEQ, number, 0, n + 3), load, *tests, *verdicts]


def build_filter(
    machine: str,
    loading: bool,
    *,
    reads: bool = False,
    writes: bool = False,
    processes: bool = False,
    network: bool = False,
) -> bytes | None:
    """The BPF program of a process that loads or scores; None for an unknown machine.

    The flags say what else is allowed. All but ``reads`` bring reading with them.
    """
    if machine not in TABLES:
        return None
    architecture, calls = TABLES[machine]
    reads = loading or reads or writes or processes or network
    names = SCORING.split()
    for wanted, more in (
        (reads, READING),
        (loading or processes, LOADING),
        (network, f"{LOADING} {NETWORK}"),
        (writes, WRITING),
        (processes, PROCESSES),
    ):
        names += more.split() if wanted else []
    conditions = dict(CONDITIONS)
    if not writes:
        conditions |= {"openat": _READ_ONLY, "open": (1, *_READ_ONLY[1:])}
    if not reads:  # libraries are mapped as code when they are read
        conditions |= {"mmap": _NO_CODE, "mprotect": _NO_CODE}
    if not (loading or processes):  # sockets' helpers, but no new processes and threads
        names = [n for n in names if n not in ("clone", "fork")]
    program = [
        _instruction(_LOAD, 4),
        _instruction(_JEQ, architecture, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, 0),
    ]
    if machine == "x86_64":  # the x32 alias of every call
        program += [_instruction(_JGE, 0x40000000, 0, 1), _instruction(_RETURN, _ERRNO | EPERM)]
    for name in dict.fromkeys(names):
        program += _allow(calls[name], conditions.get(name)) if name in calls else []
    for name in ABSENT.split():
        program += [_instruction(_JEQ, calls[name], 0, 1), _instruction(_RETURN, _ERRNO | ENOSYS)]
    return b"".join([*program, _instruction(_RETURN, _ERRNO | EPERM)])


def _prctl(*arguments: object) -> int:
    """0, or the error's number."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    words += [ctypes.c_ulong(0)] * (5 - len(words))
    return 0 if libc.prctl(*words) == 0 else ctypes.get_errno()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent thread dies, where it can."""
    if platform.system() == "Linux":
        _prctl(PR_SET_PDEATHSIG, 9)


def install(loading: bool, **allowed: bool) -> str:
    """Put this process, for good, behind the filter; returns why not, "" when it holds."""
    if platform.system() != "Linux":
        return f"{platform.system()} has no seccomp"
    program = build_filter(platform.machine(), loading, **allowed)
    if program is None:
        return f"the calls of {platform.machine()} are not known here"
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog { unsigned short len; struct sock_filter *filter; }
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    pointer = ctypes.create_string_buffer(header, len(header))
    error = _prctl(PR_SET_NO_NEW_PRIVS, 1)
    error = error or _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(pointer))
    return f"the kernel refuses a seccomp filter (error {error})" if error else ""
