"""Programs that attack their sandbox, and what shows that one got through.

    python tests/support/sandbox_attacks.py BACKEND

A program prints THROUGH where an act that must fail did not. Besides that, whoever ran it looks for its secret in the
output, for files, signals, packets, processes and lost time. Programs are bounded (at most 100 processes) and touch
nothing but their scene, so that they may run without isolation too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if importlib.util.find_spec("torch") is None:  # a plain Python, which has what a sandbox needs and no more
    sys.modules["paced_fast.rewards"] = package = types.ModuleType("paced_fast.rewards")
    package.__path__ = [str(Path(__file__).resolve().parents[2] / "paced_fast" / "rewards")]

from paced_fast.rewards.sandbox import Limits, Sandbox, SandboxError, open_sandbox

LIMITS = Limits(seconds=1.0, cpu_seconds=2, memory_mib=256, file_mib=4, output_kib=64, threads=16)
SECONDS = LIMITS.seconds + 16.0
"""An answer later than this is late: what hangs the trainer does so for 20 s or more. The slack is a busy machine's."""

_PREFACE = r"""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(action):
    try:
        action()
    except BaseException as error:
        print("held:", repr(error)[:80])
    else:
        print("THROUGH", flush=True)
def refused(*numbers):
    if os.uname().machine != "x86_64":  # the numbers are those of x86_64
        return
    ctypes.set_errno(0)
    result = libc.syscall(*map(ctypes.c_long, (*numbers, *[0] * (7 - len(numbers)))))
    if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS, errno.EACCES):
        print("THROUGH", numbers, result, ctypes.get_errno(), flush=True)
"""

READING = {
    "environment": "print(dict(os.environ)); libc.getenv.restype = ctypes.c_char_p; print(libc.getenv(b'SCENE_TOKEN'))",
    "environments of processes": """
for process in (1, 2, os.getppid(), @PARENT@, @KEEPER@, "self", "thread-self"):
    for name in ("environ", "cmdline", "maps", "mem"):
        try:
            print(process, open(f"/proc/{process}/{name}", "rb").read(20000))
        except OSError:
            pass
""",
    "memory of the trainer": "attempt(lambda: open('/proc/@PARENT@/mem', 'rb'))",
    "memory of itself by proc": "attempt(lambda: open('/proc/self/mem', 'rb'))",
    "descriptors of the trainer": "attempt(lambda: os.listdir('/proc/@PARENT@/fd'))",
    "tests on disk": "print(open('@FOLDER@/tests.json').read())",
    "tests by a link": "os.symlink('@FOLDER@/tests.json', '/tmp/l'); print(open('/tmp/l').read())",
    "tests by a hard link": "attempt(lambda: os.link('@FOLDER@/tests.json', '/tmp/l'))",
    "tests by climbing": """
for depth in range(12):
    try:
        print(open('../' * depth + '@FOLDER@'[1:] + '/tests.json').read())
    except OSError:
        pass
""",
    "search of the disk": """
import itertools
for root, _, files in itertools.islice(os.walk('/'), 5000):
    if 'tests.json' in files and 'token' in root:
        print('THROUGH', root)
    if root.startswith(('/etc', '/home', '/var', '/work', '/opt', '/sys', '/proc')) and set(files) - {'ld.so.cache'}:
        print('THROUGH', root, files[:3])
""",
    "shadow": "attempt(lambda: open('/etc/shadow').read())",
    "passwd": "attempt(lambda: open('/etc/passwd').read())",
    "home": """
for name in os.listdir('@HOME@'):
    if os.path.isfile('@HOME@/' + name):
        attempt(lambda: open('@HOME@/' + name).read())
""",
    "the trainer's code": "attempt(lambda: open('@PACKAGE@/trainer.py').read())",
    "disks and kernel log": """
for name in os.listdir('/dev'):
    if name not in ('null', 'zero', 'random', 'urandom', 'full', 'tty', 'shm', 'pts', 'mqueue', 'fd'):
        attempt(lambda: open('/dev/' + name, 'rb').read(1))
""",
    "descriptors left open": """
for descriptor in range(5, 1000):
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    print("THROUGH", descriptor)
""",
    "way out by a descriptor": """
for descriptor in range(64):
    try:
        os.fchdir(descriptor)
        print('THROUGH', open('etc/passwd').read())
    except OSError:
        pass
""",
    "files by handle": "refused(304, -100, 0, 0)",
}

WRITING = {
    "files anywhere": """
import json as module
for folder in ('@FOLDER@', '/', '/etc', '/root', '/usr/lib', '/var/tmp', '/dev', '/run', os.path.dirname(os.__file__)):
    try:
        open(folder + '/scene-@TOKENNAME@', 'w').write('x')
    except OSError:
        continue
    print('THROUGH', folder)
""",
    "shared memory": "attempt(lambda: open('/dev/shm/scene-@TOKENNAME@', 'w'))",
    "the standard library": "attempt(lambda: open(os.__file__, 'a'))",
    "append to the tests": "attempt(lambda: open('@FOLDER@/tests.json', 'a').write('x'))",
    "delete the tests": "attempt(lambda: os.unlink('@FOLDER@/tests.json'))",
    "times of the tests": "attempt(lambda: os.utime('@FOLDER@/tests.json', (0, 0)))",
    "length of the tests": "attempt(lambda: os.truncate('@FOLDER@/tests.json', 0))",
    "modes of the tests": "attempt(lambda: os.chmod('@FOLDER@/tests.json', 0o600))",
    "a full disk": """
written = 0
try:
    for number in range(64):
        with open(f'/tmp/{number}', 'wb') as file:
            for _ in range(2):
                written += file.write(bytes(1 << 20))
except OSError:
    pass
if written > (12 << 20):
    print('THROUGH', written)
""",
    "a hundred thousand files": """
made = 0
try:
    for made in range(20000):
        os.close(os.open(f'/tmp/f{made}', os.O_CREAT))
except OSError:
    pass
for number in range(made):
    os.unlink(f'/tmp/f{number}')
if made > 5000:
    print('THROUGH', made)
""",
    "a sparse terabyte": """
def grow():
    with open('/tmp/sparse', 'wb') as file:
        file.truncate(1 << 40)
attempt(grow)
""",
    "memory as a file": "attempt(lambda: os.memfd_create('x'))",
    "a core dump": """
import resource
attempt(lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30)))
os.abort()
""",
    "terminal input": "refused(16, 0, 0x5412, 0)",
}

NETWORK = {
    "tcp": "import socket; attempt(lambda: socket.create_connection(('127.0.0.1', @TCP@), 1).send(b'x'))",
    "udp": """
import socket
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@)))
""",
    "unix socket": """
import socket
s = None
def connect():
    global s
    s = socket.socket(socket.AF_UNIX)
    s.connect('@FOLDER@/socket')
attempt(connect)
""",
    "abstract socket": """
import socket
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect('\\0scene-@TOKENNAME@')
attempt(connect)
""",
    "netlink": "import socket; attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))",
    "listening": "import socket; attempt(lambda: socket.create_server(('127.0.0.1', 0)))",
    "socket pair": "import _socket; attempt(lambda: _socket.socketpair())",
    "messages on its pipes": "refused(46, 1, 0, 0); refused(47, 0, 0, 0)",
}

SIGNALS = {
    "kill a process": "attempt(lambda: os.kill(@VICTIM@, 9))",
    "kill its parent": "attempt(lambda: os.kill(os.getppid() or 999999, 10))",
    "signal the trainer": "attempt(lambda: os.kill(@PARENT@, 10))",
    "kill the keeper": "attempt(lambda: os.kill(@KEEPER@, 9))",
    "stop the keeper": "attempt(lambda: os.kill(@KEEPER@, 19))",
    "signal by pidfd": """
import signal
attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(@VICTIM@), 9))
""",
    "signal by a descriptor": """
import fcntl
reader, writer = os.pipe()
attempt(lambda: fcntl.fcntl(reader, fcntl.F_SETOWN, @VICTIM@))
attempt(lambda: fcntl.fcntl(reader, 10, 9))  # F_SETSIG
attempt(lambda: fcntl.fcntl(reader, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK))
os.write(writer, b'x')
""",
    "words by locks": """
import fcntl, struct
file = open(os.__file__, 'rb')
attempt(lambda: fcntl.flock(file, fcntl.LOCK_SH))
attempt(lambda: fcntl.lockf(file, fcntl.LOCK_SH, 1, 7))
attempt(lambda: fcntl.fcntl(file, fcntl.F_GETLK, struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 7, 1, 0)))
""",
    "signal a thread": "refused(234, @VICTIM@, @VICTIM@, 9); refused(200, @VICTIM@, 9)",
    "queue a signal": "refused(129, @VICTIM@, 10, 0)",
    "limits of another": """
import resource
attempt(lambda: resource.prlimit(@VICTIM@, resource.RLIMIT_NOFILE, (3, 3)))
""",
    "priority": "attempt(lambda: os.setpriority(os.PRIO_PROCESS, @VICTIM@, 19)); attempt(lambda: os.nice(-5))",
    "affinity": "attempt(lambda: os.sched_setaffinity(@VICTIM@, {0}))",
    "ptrace": "refused(101, 16, @VICTIM@, 0, 0); refused(101, 0, 0, 0, 0)",
    "read another's memory": "refused(310, @VICTIM@, 0, 0, 0, 0, 0); refused(311, @VICTIM@, 0, 0, 0, 0, 0)",
    "descriptor of another": "refused(438, 3, 0, 0)",
}

PROCESSES = {
    "fork bomb": """
made = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            import time; time.sleep(2); os._exit(0)
        made += 1
except OSError:
    pass
if made:
    print('THROUGH', made)
""",
    "daemon": """
def daemon():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for descriptor in range(64):
                try:
                    os.close(descriptor)
                except OSError:
                    pass
            import time; time.sleep(20)
        os._exit(0)
attempt(daemon)
""",
    "heir of the pipes": """
def heir():
    if os.fork() == 0:
        import time; time.sleep(20); os._exit(0)
attempt(heir)
""",
    "fork by the C library": """
child = libc.fork()
if child == 0:
    os._exit(0)
if child != -1:
    print('THROUGH')
""",
    "clone": "refused(56, 17); refused(435, 0, 0); refused(57) if os.uname().machine == 'x86_64' else None",
    "a shell": "attempt(lambda: os.execv('/bin/sh', ['/bin/sh', '-c', 'echo THROUGH']))",
    "another interpreter": "attempt(lambda: os.execv(sys.executable, [sys.executable, '-c', 'print(\"THROUGH\")']))",
    "subprocess": "import subprocess; attempt(lambda: subprocess.run(['/bin/true'], check=True))",
    "spawn": "attempt(lambda: os.posix_spawn('/bin/true', ['true'], {}))",
    "system": """
if os.system('exit 0') == 0:
    print('THROUGH')
""",
    "a program of its own": """
with open('/tmp/p', 'w') as file:
    file.write('#!/bin/sh\\necho THROUGH\\n')
os.chmod('/tmp/p', 0o4755)
attempt(lambda: os.execv('/tmp/p', ['p']))
""",
    "exec by descriptor": "refused(322, 0, 0, 0, 0, 0x1000)",
    "hundreds of threads": """
import threading, time
threading.stack_size(32768)
alive = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(0.3,), daemon=True).start()
        alive += 1
except RuntimeError:
    pass
if alive > 20:
    print('THROUGH', alive)
""",
}

KERNEL = {
    "user namespace": "refused(272, 0x10000000)",
    "mount namespace": "refused(272, 0x20000); refused(308, 0, 0)",
    "mount": "refused(165, 0, 0, 0, 0, 0); refused(428, 0, 0, 0); refused(430, 0, 0); refused(166, 0, 0)",
    "chroot": "attempt(lambda: os.chroot('/tmp')); refused(155, 0, 0)",
    "io_uring": "refused(425, 0, 0); refused(426, 0); refused(427, 0)",
    "keys": "refused(250, 0, 0); refused(248, 0, 0, 0, 0, 0); refused(249, 0, 0, 0, 0)",
    "bpf": "refused(321, 0, 0, 0)",
    "perf": "refused(298, 0, 0, 0, 0, 0)",
    "userfaultfd": "refused(323, 0)",
    "modules": "refused(175, 0, 0, 0); refused(313, -1, 0, 0); refused(246, 0, 0, 0, 0)",
    "personality": "refused(135, 0x0040000)",
    "x32 calls": "refused(0x40000000 | 39)",
    "segments and ports": "refused(154, 1, 0, 0); refused(172, 3); refused(173, 0, 1, 1)",
    "shared memory segments": "refused(29, 1, 4096, 0o1666); refused(68, 1, 0o1666); refused(64, 1, 1, 0o1666)",
    "watch files": "refused(300, 0, 0); refused(253)",
    "undo seccomp": "refused(317, 1, 0, 0); refused(157, 22, 2, 0); refused(157, 38, 0, 0, 0, 0)",
    "become root": "attempt(lambda: os.setuid(0)); attempt(lambda: os.setresuid(0, 0, 0)); refused(126, 0, 0)",
    "landlock anew": "refused(444, 0, 0, 0)",
    "clock and name": "refused(170, 0, -1); refused(227, 99, 0); refused(103, 99, 0, 0)",
}

RESOURCES = {
    "four gigabytes": "attempt(lambda: bytearray(4 << 30))",
    "memory by a map": "import mmap; attempt(lambda: mmap.mmap(-1, 1 << 32))",
    "memory bit by bit": """
kept = []
try:
    while len(kept) < 2000:
        kept.append(bytearray(1 << 20))
except MemoryError:
    pass
if len(kept) > 300:
    print('THROUGH', len(kept))
""",
    "raise its limits": """
import resource
for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    attempt(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))
""",
    "spin": "while True: pass",
    "spin in C": "10 ** 10 ** 9",
    "spin in threads": """
import threading
def spin():
    while True: pass
for _ in range(8):
    threading.Thread(target=spin, daemon=True).start()
spin()
""",
    "sleep": "import time; time.sleep(30)",
    "sleep deaf to signals": """
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: time.sleep(1)
""",
    "stop itself": "os.kill(os.getpid(), 19); import time; time.sleep(30)",
    "close all and sleep": """
for descriptor in range(64):
    try:
        os.close(descriptor)
    except OSError:
        pass
import time; time.sleep(30)
""",
    "output flood": "while True: os.write(1, b'x' * 65536)",
    "error flood": "while True: os.write(2, b'x' * 65536)",
    "slow trickle": """
import time
while True:
    os.write(1, b'x'); time.sleep(0.01)
""",
    "pipes that nobody reads": "sys.stdin.close(); print('x' * 30000); import time; time.sleep(30)",
    "crash of the stack": """
def nest(depth):
    return [] if depth == 0 else [nest(depth - 1)]
sys.setrecursionlimit(10 ** 9)
class Deep:
    def __repr__(self): return repr(self)
repr(Deep())
""",
    "segmentation fault": "ctypes.string_at(0)",
    "compiler bomb": "exec('(' * 100000)",
    "pattern bomb": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    "descriptors without end": """
kept = []
try:
    while len(kept) < 5000:
        kept.append(os.open('/dev/null', 0))
except OSError:
    pass
if len(kept) > 100:
    print('THROUGH', len(kept))
""",
}

GROUPS = {
    "reading": READING,
    "writing": WRITING,
    "network": NETWORK,
    "signals": SIGNALS,
    "processes": PROCESSES,
    "kernel": KERNEL,
    "resources": RESOURCES,
}
ATTACKS = {f"{group}: {name}": text for group, attacks in GROUPS.items() for name, text in attacks.items()}

# The first program leaves something behind, the second, next in the same place, prints THROUGH if it finds it.
PERSISTENCE = {
    "a file": (
        "open('/tmp/left', 'w').write('x')",
        """
try:
    left = os.path.exists('/tmp/left') or os.listdir('/tmp')
except PermissionError:
    left = False
print('THROUGH' if left else 'clean')
""",
    ),
    "a builtin": (
        "import builtins; builtins.sorted = builtins.len = lambda *a: 1",
        "print('clean' if len([1, 2]) == 2 and sorted([2, 1]) == [1, 2] else 'THROUGH')",
    ),
    "a module": (
        "import json, math; json.dumps = None; math.sqrt = None; sys.modules['left'] = sys",
        "import json, math; print('clean' if json.dumps and math.sqrt and 'left' not in sys.modules else 'THROUGH')",
    ),
    "an environment": (
        "os.environ['LEFT'] = 'x'; libc.setenv(b'LEFT', b'x', 1)",
        "libc.getenv.restype = ctypes.c_char_p; print('THROUGH' if libc.getenv(b'LEFT') else 'clean')",
    ),
    "process state": (
        "os.umask(0); sys.setrecursionlimit(50); import signal; signal.signal(15, signal.SIG_IGN)",
        """
import signal
same = os.umask(18) == 18 and sys.getrecursionlimit() == 1000 and signal.getsignal(15) == signal.SIG_DFL
print('clean' if same else 'THROUGH')
""",
    ),
    "a broken keeper": (
        "os.kill(1, 9) if os.getpid() != 1 else None\nfor d in range(3, 64):\n try: os.write(d, b'{}\\n' * 100)\n"
        " except OSError: pass",
        "print('clean')",
    ),
}


@dataclass
class Scene:
    """What a program could steal, spoil or reach, and what came of it."""

    token: str
    folder: Path
    victim: subprocess.Popen[bytes]
    listeners: list[socket.socket]
    sockets: list[socket.socket] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)

    def fill(self, text: str, keeper: int) -> str:
        """The program with its targets."""
        package = Path(sys.modules["paced_fast.rewards.sandbox"].__file__ or "").parents[2]
        values = {
            "FOLDER": self.folder,
            "TOKENNAME": self.folder.name,
            "VICTIM": self.victim.pid,
            "PARENT": os.getpid(),
            "KEEPER": keeper,
            "HOME": Path.home(),
            "PACKAGE": package,
            "TCP": self.listeners[0].getsockname()[1],
            "UDP": self.listeners[1].getsockname()[1],
        }
        text = _PREFACE + text
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        return text

    def traces(self) -> list[str]:
        """What an attack has changed outside of its sandbox, which is put back for the next."""
        found = []
        if self.victim.poll() is not None:
            found.append("killed a process")
            self.victim = _victim()
        if self.signals:
            found.append(f"sent signals {self.signals}")
            self.signals.clear()
        names = {path.name for path in self.folder.iterdir()} ^ {"tests.json", "socket"}
        if names:
            found.append(f"wrote or removed {sorted(names)}")
            for name in names - {"tests.json", "socket"}:
                (self.folder / name).unlink()
        tests = self.folder / "tests.json"
        if not tests.exists() or tests.read_text() != self.token or tests.stat().st_mode & 0o777 != 0o666:
            found.append("changed the tests")
            tests.write_text(self.token)
            tests.chmod(0o666)
        for listener in self.listeners:
            with contextlib.suppress(BlockingIOError):
                if listener.type == socket.SOCK_STREAM:
                    listener.accept()[0].close()
                else:
                    listener.recv(10)
                found.append(f"reached {listener.family.name} {listener.type.name}")
        for place in ("/dev/shm", "/", "/etc", "/root", "/usr/lib", "/var/tmp", "/dev", "/run"):
            with contextlib.suppress(OSError):
                if Path(place, f"scene-{self.folder.name}").exists():
                    found.append(f"wrote to {place}")
                    Path(place, f"scene-{self.folder.name}").unlink()
        return found


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    """Secrets, a process, listeners and a writable folder; the token is in the environment too."""
    token = os.environ.get("SCENE_TOKEN", "")
    assert token, "SCENE_TOKEN must be in the environment that this process began with"
    with tempfile.TemporaryDirectory(prefix="token", dir="/var/tmp") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o777)
        (folder / "tests.json").write_text(token)
        (folder / "tests.json").chmod(0o666)
        listeners = []
        for family, kind, address in (
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            (socket.AF_UNIX, socket.SOCK_STREAM, str(folder / "socket")),
            (socket.AF_UNIX, socket.SOCK_STREAM, f"\0scene-{folder.name}"),
        ):
            listener = stack.enter_context(socket.socket(family, kind))
            listener.bind(address)
            if kind == socket.SOCK_STREAM:
                listener.listen()
            listener.setblocking(False)
            listeners.append(listener)
        (folder / "socket").chmod(0o777)
        made = Scene(token, folder, _victim(), listeners)
        old = signal.signal(signal.SIGUSR1, lambda number, frame: made.signals.append(number))
        try:
            yield made
        finally:
            signal.signal(signal.SIGUSR1, old)
            made.victim.kill()
            made.victim.wait()


def _victim() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])


def leftovers(keepers: Iterable[int], expected: int) -> list[str]:
    """Processes below the keepers, zombies included, beyond the `expected` ones of the keepers themselves."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                text = Path("/proc", entry, "stat").read_text()
                parents[int(entry)] = int(text.rpartition(")")[2].split()[1])
    below, level = set[int](), set(keepers)
    while level := {pid for pid, parent in parents.items() if parent in level}:
        below |= level
    return [] if len(below) <= expected else [f"left {len(below) - expected} processes"]


def run_attack(box: Sandbox, made: Scene, text: str) -> list[str]:
    """What got through of one attack."""
    keeper = next(iter(box.keepers()), made.victim.pid)
    began = time.monotonic()
    try:
        outcome = box.run(made.fill(text, keeper))
    except SandboxError as error:
        return [f"brought the sandbox down ({error})", *made.traces()]
    found = [f"took {time.monotonic() - began:.1f} s"] if time.monotonic() - began > SECONDS else []
    output = outcome.stdout + outcome.stderr
    if made.token.encode() in output:
        found.append("read the secret")
    if b"THROUGH" in outcome.stdout:
        found.append(outcome.stdout[outcome.stdout.index(b"THROUGH") :][:60].decode(errors="replace").strip())
    if len(output) > 4 * LIMITS.output_kib * 1024:
        found.append("flooded the trainer")
    return found + made.traces()


def run_persistence(box: Sandbox, made: Scene, pair: tuple[str, str]) -> list[str]:
    """What the second program found of the first."""
    first, second = (made.fill(text, next(iter(box.keepers()), made.victim.pid)) for text in pair)
    box.run(first)
    outcome = box.run(second)
    return [] if outcome.stdout == b"clean\n" else [f"found what was left ({outcome.stdout[:40]!r})"]


def run_all(backend: Any, threads: int = 3, every: int = 1) -> dict[str, list[str]]:
    """All attacks on one backend, or one in `every`: its name, and what got through."""
    results: dict[str, list[str]] = {}
    attacks = dict(list(ATTACKS.items())[::every])
    # One at a time where the traces are those of all; those that only wait share the time.
    waiting = {name for name in attacks if name.startswith("resources")}
    with scene() as made:
        box = open_sandbox(backend, LIMITS, workers=threads)
        try:
            with ThreadPoolExecutor(threads) as pool:
                futures = {name: pool.submit(run_attack, box, made, attacks[name]) for name in waiting}
                results.update({name: future.result() for name, future in futures.items()})
        finally:
            box.close()
        box = open_sandbox(backend, LIMITS, workers=1)
        try:
            for name, text in attacks.items():
                if name not in waiting:
                    results[name] = run_attack(box, made, text)
            for name, pair in PERSISTENCE.items():
                results[f"persistence: {name}"] = run_persistence(box, made, pair)
            inner = int(box.strength.startswith("fork_server: namespaces"))
            ends = time.monotonic() + 60.0
            while (left := leftovers(box.keepers(), inner)) and time.monotonic() < ends:
                time.sleep(0.05)
            results["processes: nothing is left"] = left
        finally:
            box.close()
    results["strength"] = [box.strength]
    return results


def refuse_namespaces() -> None:
    """From here on this process and its children can have no new namespaces, as in many containers."""
    from refused_calls import refusing_filter

    from paced_fast.rewards.sandbox import linux

    linux.forbid_new_privileges()
    linux.apply_filter(refusing_filter({"unshare": (272, 97), "mount": (165, 40)}))


def leave_the_machine_alone() -> None:
    """/tmp and System V memory of this process and its children are their own: for runs without isolation."""
    from paced_fast.rewards.sandbox import linux

    linux.unshare(linux.NEWNS | linux.NEWIPC)
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID, "size=256m,mode=1777")


if __name__ == "__main__":
    if sys.argv[1] == "unsafe":
        leave_the_machine_alone()
    if "--refuse-namespaces" in sys.argv:
        refuse_namespaces()
    sys.stdout.write(json.dumps(run_all(sys.argv[1], every=5 if "--sample" in sys.argv else 1)))
