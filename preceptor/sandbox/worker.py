"""The process that runs programs: it confines itself, forks a child for each program, and watches over it.

It is a fresh interpreter without site packages, environment or anything of the parent's memory; it is sent programs and
calls, never what the calls should give. It speaks with the parent over its standard input and output, in JSON with the
length before it (4 bytes, big endian).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import posixpath
import re
import select
import signal
import socket
import struct
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.sandbox import syscalls
from preceptor.sandbox.child import PROGRAM, Ends, run_program
from preceptor.sandbox.kernel import CONTINUE, RECEIVE, SEND, Kernel

LONGEST_RESULTS = 1 << 20  # bytes that a program may return over all its calls


OWN = f"{Path(__file__).parent}/"


AT_EASE = (OWN, "/dev/", "/etc/ld.so", "/etc/localtime", "/usr/share/zoneinfo", "/usr/lib/locale", "/usr/share/locale")


"""What the interpreter and the C library look for by themselves, as they do for shared libraries; a printed stack looks
for the lines of this package. It is refused, and the program goes on."""


PRELOADED = (
    "abc array ast base64 bisect calendar cmath collections collections.abc contextlib copy csv ctypes dataclasses "
    "datetime decimal enum fractions functools hashlib heapq io itertools json math numbers operator random re "
    "statistics string struct textwrap time traceback types typing unicodedata zlib"
)


"""Modules that programs use, loaded once, before the fork."""


@dataclass
class RunningProgram:
    """A running program: its process, the descriptors to watch, and what became of it."""

    process: int
    handle: int
    listener: int
    results: int
    output: int
    why: str = ""
    detail: str = ""
    made: int = 0
    written: dict[int, bytearray] = field(default_factory=dict)

    def blame(self, why: str, detail: str) -> None:
        """Say why the program failed; the first reason counts."""
        if not self.why:
            self.why, self.detail = why, detail

    def end(self, why: str, detail: str) -> None:
        """Kill the program, and say why."""
        self.blame(why, detail)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)


class Worker:
    """The confined interpreter that forks programs.

    ``settings``: folder (where programs run), without (layers not to take), and memory, processor, wall, file, files,
    output, descriptors, as ``Limits`` names them, sizes in bytes.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.folder = Path(settings["folder"])
        self.kernel = Kernel()
        self.table = syscalls.forbidden(self.kernel.machine)
        self.names = {number: name for name, number in self.kernel.numbers.items()}
        self.library = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
        self.rules: int | None = None
        self.notify = True
        self.null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def confine(self) -> dict[str, Any]:
        """Take every layer that this kernel grants, and say which, for those that judge whether they are enough."""
        without = self.settings["without"]
        spaces = [] if "namespaces" in without else self.kernel.unshare()
        if "processes" in spaces:
            _step_into_new_processes()
        user = self.kernel.drop_user(self.folder, self.library)
        self.kernel.drop_capabilities()
        version = 0 if "landlock" in without else self.kernel.landlock_version()
        filters = "filter" not in without and self._try(lambda: self.kernel.filter(notify=False))
        self.notify = filters and "notify" not in without and self._try(lambda: self.kernel.filter(notify=True))
        self.settings |= {"filter": filters, "notify": self.notify}
        if version:
            self.rules = self._rules()
        if "processes" in spaces:
            self.kernel.die_with_parent()  # now: a change of user forgets it
        return {
            "landlock": version,
            "filter": filters,
            "notify": self.notify,
            "namespaces": spaces,
            "nobody": user,
            "root": os.geteuid() == 0,
        }

    def _try(self, what: Callable[[], object]) -> bool:
        """Whether a function of no arguments ends without an error in a child process."""
        child = os.fork()
        if child == 0:
            try:
                what()
            except BaseException:  # whatever the kernel does not know
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def _rules(self) -> int:
        foreign = ("site-packages", "dist-packages")
        parts = [part for folder in self.library for part in folder.iterdir() if part.name not in foreign]
        write = [self.folder] if self.notify else []  # without a supervisor nobody counts the files
        return self.kernel.landlock_rules(parts, self.library, write)

    def run(self, source: str, calls: Sequence[str]) -> dict[str, Any]:
        """Run a program in a child and watch over it until it ends: what it wrote, and what became of it."""
        started = time.monotonic()
        results, write_results = os.pipe()
        output, write_output = os.pipe()
        mine, theirs = socket.socketpair()
        process = os.fork()
        if process == 0:
            ends = Ends(write_results, write_output, self.null, theirs, self.rules)
            run_program(source, calls, ends, self.kernel, self.settings)
        for one in (write_results, write_output):
            os.close(one)
        theirs.close()
        listener = self._receive(mine)
        watch = RunningProgram(process, os.pidfd_open(process), listener, results, output)
        watch.written = {results: bytearray(), output: bytearray()}
        try:
            self._watch(watch, started + self.settings["wall"])
        finally:
            for one in (watch.handle, listener, results, output):
                if one >= 0:
                    os.close(one)
        _, status, usage = os.wait4(process, 0)
        ended = os.waitstatus_to_exitcode(status)
        if max(_empty(self.folder), default=0) >= self.settings["file"]:
            watch.blame("disk", f"a file reached {self.settings['file']} bytes")
        if ended == -signal.SIGKILL and usage.ru_utime + usage.ru_stime >= self.settings["processor"]:
            watch.blame("time", "of the processor")  # it has ignored SIGXCPU
        return {
            "why": watch.why,
            "detail": watch.detail,
            "status": ended,
            "seconds": time.monotonic() - started,
            "results": watch.written[results].decode("utf-8", "replace"),
            "output": watch.written[output][:2000].decode("utf-8", "replace"),
        }

    def _receive(self, mine: socket.socket) -> int:
        """The listener that the child hands over; -1 when it has none."""
        with mine:
            _, descriptors, _, _ = socket.recv_fds(mine, 1, 1)
        return descriptors[0] if descriptors else -1

    def _watch(self, watch: RunningProgram, deadline: float) -> None:
        poll = select.poll()
        for one in (watch.handle, watch.listener, watch.results, watch.output):
            if one >= 0:
                poll.register(one, select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                watch.end("time", f"it ran for more than {self.settings['wall']:g} s")
            events = poll.poll(max(0.0, left) * 1000 if not watch.why else 5000)
            for descriptor, event in events:
                if descriptor == watch.listener and event & select.POLLIN:
                    self._decide(watch)
                elif descriptor in watch.written and event & select.POLLIN:
                    self._read(watch, descriptor)
                elif event & select.POLLHUP and descriptor != watch.handle:
                    poll.unregister(descriptor)
            if any(descriptor == watch.handle for descriptor, _ in events):
                self._drain(watch)
                return

    def _read(self, watch: RunningProgram, descriptor: int) -> int:
        piece = os.read(descriptor, 1 << 16)
        held = watch.written[descriptor]
        held += piece
        most = LONGEST_RESULTS if descriptor == watch.results else self.settings["output"]
        if len(held) > most:
            del held[most:]
            what = "returned" if descriptor == watch.results else "printed"
            watch.end("output", f"it {what} more than {most} bytes")
        return len(piece)

    def _drain(self, watch: RunningProgram) -> None:
        for descriptor in watch.written:
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while self._read(watch, descriptor):
                    pass

    def _decide(self, watch: RunningProgram) -> None:
        """Answer one system call that the filter holds back: let it go on, refuse it, or end the program."""
        notice = bytearray(80)
        try:
            fcntl.ioctl(watch.listener, RECEIVE, notice, True)
        except OSError:  # the program has ended meanwhile
            return
        identity, process, _, number, _, _, *arguments = struct.unpack("<QIIiIQ6Q", notice)
        error, flags = self._judge(watch, process, number, arguments)
        if not watch.why:
            with contextlib.suppress(OSError):
                fcntl.ioctl(watch.listener, SEND, bytearray(struct.pack("<QqiI", identity, 0, error, flags)), True)

    def _judge(self, watch: RunningProgram, process: int, number: int, arguments: Sequence[int]) -> tuple[int, int]:
        """The error (0 or negative) and the flags of the answer to a system call; it may end the program."""
        name = self.names.get(number, "")
        if name in syscalls.OPENING:
            first = 1 if name == "openat" else 0
            makes = bool(arguments[first + 1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            return self._judge_path(watch, process, arguments[0] if first else -100, arguments[first], makes)
        if name in syscalls.MAKING_FOLDERS:
            first = 1 if name == "mkdirat" else 0
            return self._judge_path(watch, process, arguments[0] if first else -100, arguments[first], True)
        if name in syscalls.SIGNALS and arguments[0] == process:
            return 0, CONTINUE  # to itself: abort()
        reason = self.table.get(number)
        if reason is not None:
            watch.end("thread" if _is_thread(self.kernel, process, name, arguments) else reason, name)
        return -1, 0  # EPERM

    def _judge_path(
        self, watch: RunningProgram, process: int, place: int, address: int, makes: bool
    ) -> tuple[int, int]:
        """Landlock decides about paths; this finds what the verdict should name, and counts the files that are made."""
        path = self.kernel.text(process, address)
        relative = not path.startswith("/")
        if relative and place & 0xFFFFFFFF != 0xFFFFFF9C:  # beneath a folder that was opened, which is allowed
            full = str(self.folder)
        else:
            full = posixpath.normpath(posixpath.join(self.folder, path))
        if any(full == str(one) or full.startswith(f"{one}/") for one in (self.folder, *self.library)):
            watch.made += makes
            if watch.made > self.settings["files"]:
                watch.end("disk", f"it opened files for writing more than {self.settings['files']} times")
            return 0, CONTINUE
        if not full.startswith(AT_EASE) and not re.search(r"\.so[.\d]*$", full):
            watch.end("file", full[:200])
        return -13, 0  # EACCES


def _empty(folder: Path) -> list[int]:
    """Remove what a folder holds, whatever its modes; the sizes of the files."""
    os.chmod(folder, 0o700)
    sizes = []
    for path in list(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            sizes += _empty(path)
            path.rmdir()
        else:
            sizes.append(path.lstat().st_size)
            path.unlink()
    return sizes


def _is_thread(kernel: Kernel, process: int, name: str, arguments: Sequence[int]) -> bool:
    """Whether a call that starts something starts a thread: CLONE_THREAD in the flags, which clone3 has in memory."""
    if name == "clone3":
        flags = kernel.memory(process, arguments[0], 8)
        return len(flags) == 8 and bool(struct.unpack("<Q", flags)[0] & 0x10000)
    return name == "clone" and bool(arguments[0] & 0x10000)


def _step_into_new_processes() -> None:
    """Go on as the first process of the new process namespace; the old one waits and ends with it."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _read_exactly(count: int) -> bytes:
    held = b""
    while len(held) < count:
        piece = os.read(0, count - len(held))
        if not piece:
            raise EOFError
        held += piece
    return held


def _answer(reply: dict[str, Any]) -> None:
    body = json.dumps(reply).encode()
    body = struct.pack(">I", len(body)) + body
    while body:
        body = body[os.write(1, body) :]


def main(options: str) -> None:
    """Serve programs until the parent closes this process's standard input."""
    for name in PRELOADED.split():
        importlib.import_module(name)
    time.localtime()  # the C library looks for the time zone's file once
    worker = Worker(json.loads(options))
    layers = worker.confine()
    os.environ.clear()
    sys.path[:] = [path for path in sys.path if any(Path(path).is_relative_to(one) for one in worker.library)]
    sys.argv[:] = [PROGRAM]
    gc.collect()
    gc.freeze()
    _answer(layers)
    try:
        while True:
            (length,) = struct.unpack(">I", _read_exactly(4))
            asked = json.loads(_read_exactly(length))
            _answer(worker.run(asked["source"], asked["calls"]))
    except (EOFError, BrokenPipeError):  # the parent has ended, perhaps without removing the folder
        with contextlib.suppress(OSError):
            worker.folder.rmdir()
