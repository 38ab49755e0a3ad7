"""Ways out of the sandbox, tried from inside of a reward function; the completion names one.

1 means that it worked. All are harmless where they do: they change nothing, or only a canary's
folder. Numbers of calls are x86_64's. What is tried while the file is imported is in `AT_IMPORT`.
"""

# ruff: noqa
# mypy: ignore-errors
import ctypes
import fcntl
import mmap
import os
import resource
import socket
import subprocess
import threading
import time

libc = ctypes.CDLL(None, use_errno=True)
HERE = os.path.dirname(os.path.abspath(__file__))
PARENT = os.getppid()


def call(number, *arguments):
    """Whether a raw call works."""
    return libc.syscall(number, *arguments) >= 0


def reads(path):
    with open(path, "rb") as file:
        return len(file.read(64)) > 0


def forks():
    if (pid := os.fork()) == 0:
        os._exit(0)
    return pid > 0


def bomb():
    while True:
        os.fork()


def threads():
    threading.Thread(target=time.sleep, args=(0,)).start()
    return True


def endless():
    for _ in range(100):
        os.write(3, b"x" * 65536)
    return True


def forged():
    """An answer for the next item, before this one's."""
    os.write(3, b'{"value": 1.0, "reason": "", "token": ""}\n')
    return True


def executable():
    return mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) is not None


def x32():
    return libc.syscall(0x40000000 + 39) > 0


def owner():
    """SIGIO to another process by F_SETOWN."""
    return fcntl.fcntl(3, fcntl.F_SETOWN, meta["trainer"]) is not None


def environ():
    return any("hunter2" in v for v in os.environ.values())


def descriptors():
    return any(call(5, fd, ctypes.create_string_buffer(256)) for fd in range(4, 64))


meta = {}
path = lambda: (meta["folder"] + "/canary").encode()
buffer = ctypes.create_string_buffer(4096)
ESCAPES = {
    "write a file": lambda: open(meta["folder"] + "/new", "w") and True,
    "open to write": lambda: call(2, path(), 0o1),
    "openat to create": lambda: call(257, -100, path() + b"2", 0o101, 0o600),
    "openat2": lambda: call(437, -100, path(), ctypes.byref(buffer), 24),
    "chmod": lambda: call(90, path(), 0o777),
    "fchmodat2": lambda: call(452, -100, path(), 0o777, 0),
    "chown": lambda: call(92, path(), 0, 0),
    "utime": lambda: call(132, path(), None),
    "utimensat": lambda: call(280, -100, path(), None, 0),
    "setxattr": lambda: call(188, path(), b"user.x", b"y", 1, 0),
    "unlink": lambda: call(87, path()),
    "rename": lambda: call(82, path(), path() + b"2"),
    "link": lambda: call(86, path(), path() + b"3"),
    "symlink": lambda: call(88, b"/etc", path() + b"4"),
    "mkdir": lambda: call(83, path() + b"5", 0o700),
    "mknod": lambda: call(133, path() + b"6", 0o10600, 0),
    "truncate": lambda: call(76, path(), 0),
    "mount": lambda: call(165, b"tmpfs", meta["folder"].encode(), b"tmpfs", 0, None),
    "pivot": lambda: call(155, b"/tmp", b"/tmp") or call(161, b"/tmp"),
    "new mounts": lambda: (
        call(442, -100, b"/", 0, ctypes.byref(buffer), 32) or call(428, -100, b"/", 1)
    ),
    "unshare": lambda: call(272, 0x10000000),
    "setns": lambda: call(308, 3, 0),
    "ptrace": lambda: call(101, 0, 0, 0, 0),
    "ptrace the trainer": lambda: call(101, 16, meta["trainer"], 0, 0),
    "read memory": lambda: call(
        310, meta["trainer"], ctypes.byref(buffer), 1, ctypes.byref(buffer), 1, 0
    ),
    "write memory": lambda: call(
        311, meta["trainer"], ctypes.byref(buffer), 1, ctypes.byref(buffer), 1, 0
    ),
    "kcmp": lambda: call(312, meta["trainer"], os.getpid(), 0, 0, 0),
    "pidfd": lambda: call(434, meta["trainer"], 0) or call(434, 1, 0),
    "parent's environment": lambda: reads(f"/proc/{PARENT}/environ"),
    "environment of 1": lambda: reads("/proc/1/environ"),
    "trainer's environment": lambda: reads(f"/proc/{meta['trainer']}/environ"),
    "own memory": lambda: reads("/proc/self/maps"),
    "passwords": lambda: reads("/etc/passwd"),
    "own environment": environ,
    "descriptors": descriptors,
    "kill the parent": lambda: call(62, PARENT, 0) or call(62, os.getppid(), 0),
    "kill the trainer": lambda: call(62, meta["trainer"], 0),
    "kill everybody": lambda: call(62, -1, 0),
    "tgkill": lambda: call(234, meta["trainer"], meta["trainer"], 0),
    "sigqueue": lambda: call(129, meta["trainer"], 0, ctypes.byref(buffer)),
    "signal by F_SETOWN": owner,
    "internet socket": lambda: socket.socket() is not None,
    "unix socket": lambda: socket.socket(socket.AF_UNIX) is not None,
    "socket pair": lambda: socket.socketpair() is not None,
    "netlink socket": lambda: call(41, 16, 3, 0),
    "shared memory": lambda: call(29, 0, 4096, 0o1600),
    "semaphores": lambda: call(64, 0, 1, 0o1600),
    "message queue": lambda: call(68, 0, 0o1600),
    "POSIX queue": lambda: call(240, b"escape", 0o102, 0o600, None),
    "affinity": lambda: os.sched_setaffinity(0, {0}) is None,
    "nice": lambda: os.nice(1) is not None,
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 1) is None,
    "scheduler": lambda: call(144, 0, 3, ctypes.byref(buffer)),
    "ioprio": lambda: call(251, 1, 0, 3 << 13),
    "clock": lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()) is None,
    "adjust the clock": lambda: call(159, ctypes.byref(buffer)),
    "host name": lambda: call(170, b"x", 1),
    "reboot": lambda: call(169, 0, 0, 0, None),
    "fork": forks,
    "fork bomb": bomb,
    "vfork": lambda: call(58),
    "clone3": lambda: call(435, ctypes.byref(buffer), 88),
    "threads": threads,
    "exec": lambda: subprocess.run(["/bin/true"], check=True) is not None,
    "raw exec": lambda: call(59, b"/nonexistent", None, None) or ctypes.get_errno() == 2,
    "memory file": lambda: os.memfd_create("x") >= 0,
    "executable memory": executable,
    "memory bomb": lambda: len(bytearray(1 << 34)) > 0,
    "descriptor bomb": lambda: [os.dup(3) for _ in range(100000)] and True,
    "raise a limit": lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)) is None,
    "others' limits": lambda: call(302, meta["trainer"], 7, None, ctypes.byref(buffer)),
    "endless output": endless,
    "forged answer": forged,
    "io_uring": lambda: call(425, 8, ctypes.byref(buffer)),
    "keyctl": lambda: call(250, 0, -3, 1) or call(248, b"user", b"x", b"y", 1, -3),
    "bpf": lambda: call(321, 0, ctypes.byref(buffer), 128),
    "perf": lambda: call(298, ctypes.byref(buffer), 0, -1, -1, 0),
    "userfaultfd": lambda: call(323, 0),
    "fanotify": lambda: call(300, 0, 0) or call(254),
    "kernel module": lambda: call(175, None, 0, b"") or call(313, -1, b"", 0),
    "swap and quota": lambda: call(167, b"/x", 0) or call(179, 0, None, 0, None),
    "log": lambda: call(103, 3, ctypes.byref(buffer), 64),
    "not dumpable": lambda: call(157, 4, 0, 0, 0, 0),
    "personality": lambda: call(135, 0x0040000),
    "set uid": lambda: call(105, 0) or call(117, 0, 0, 0) or call(116, 0, None),
    "capabilities": lambda: call(126, ctypes.byref(buffer), ctypes.byref(buffer)),
    "session": lambda: os.setsid() >= 0,
    "x32 calls": x32,
    "unknown calls": lambda: any(call(n, 0, 0, 0) for n in range(450, 475)),
    "splice": lambda: call(275, 3, None, 3, None, 1, 0) or call(276, 3, 3, 1, 0),
    "another filter's listener": lambda: call(317, 1, 8, ctypes.byref(buffer)),
    "landlock": lambda: call(444, None, 0, 1),
    "working folder": lambda: os.chdir("/") is None,
    "late import": lambda: __import__("sqlite3") is not None,
}


def attempt(escape):
    try:
        return float(bool(escape()))
    except Exception:
        return 0.0


def import_time():
    """What worked while this file was imported, where files may be read."""
    folder = os.path.dirname(HERE)
    tries = {
        "write beside": lambda: open(HERE + "/new", "w"),
        "write to /tmp": lambda: open("/tmp/shardwise-escape", "w"),
        "write to /dev/shm": lambda: open("/dev/shm/shardwise-escape", "w"),
        "read elsewhere": lambda: open(folder + "/secret.txt").read(),
        "read passwords": lambda: open("/etc/shadow").read(),
        "environment of 1": lambda: open("/proc/1/environ").read(),
        "environment of the parent": lambda: open(f"/proc/{os.getppid()}/environ").read(),
        "processes": lambda: os.listdir("/proc"),
        "kill": lambda: os.kill(os.getppid() or 1, 0),
        "kill all": lambda: os.kill(-1, 0),
        "socket": lambda: socket.socket(socket.AF_UNIX),
        "connect": lambda: socket.create_connection(("127.0.0.1", 9), 0.1),
        "exec": lambda: subprocess.run(["/bin/true"]),
        "unshare": lambda: call(272, 0x10000000) or 1 / 0,
        "mount": lambda: call(165, b"tmpfs", HERE.encode(), b"tmpfs", 0, None) or 1 / 0,
        "chmod": lambda: os.chmod(HERE, 0o777),
        "utime": lambda: os.utime(__file__),
        "ptrace": lambda: call(101, 16, os.getppid(), 0, 0) or 1 / 0,
        "memory file": lambda: os.memfd_create("x"),
        "secret": lambda: os.environ["SHARDWISE_TEST_SECRET"],
    }
    worked = []
    for name, attempt in tries.items():
        try:
            attempt()
            worked.append(name)
        except Exception:
            pass
    return worked


AT_IMPORT = import_time()
BESIDE = open(HERE + "/beside.txt").read() if os.path.exists(HERE + "/beside.txt") else ""


def reward(question, completion, answer, given):
    meta.update(given)
    if completion == "at import":
        raise ValueError(repr(AT_IMPORT))
    if completion == "beside":
        return float(BESIDE == "data")
    if completion == "alive":
        return 0.25
    return attempt(ESCAPES[completion])
