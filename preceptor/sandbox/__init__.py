"""Judge programs that nobody has read, by running their tests where they can do no harm.

Each program runs in a process of its own, forked from a worker that knows nothing (a fresh interpreter, no environment,
no site packages), behind the kernel's means: Landlock (no file but the interpreter's library and a private folder), a
seccomp filter (no socket, process, thread, signal, trace, link, mount), empty namespaces for network, processes and IPC
where they are granted, no capabilities, limits on time, memory, file size and open files. A supervisor holds the
filter's listener: it counts the files that are made and says why a program was stopped, which the program cannot forge.
The worker is sent the tests' calls only; values come back and are compared here with what was expected.

Where the kernel gives no isolation of files or of the network, nothing is run. What a program can still learn is that a
file exists, how large it is, and what this machine's clock says.
"""

from __future__ import annotations

import os
import platform
import queue
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from preceptor.errors import UserError
from preceptor.sandbox.pool import Lost, WorkerProcess
from preceptor.sandbox.syscalls import ARCHITECTURES
from preceptor.sandbox.values import Expectation, read_tests
from preceptor.sandbox.verdicts import Reason, Verdict, conclude

__all__ = ["Expectation", "SandboxLimits", "Program", "Reason", "Sandbox", "Verdict", "read_tests", "sandbox_layers"]


LONGEST_SOURCE = 1 << 16  # characters


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use, over all its tests."""

    processor: float = 2.0
    """Processor time in seconds; the kernel counts whole ones."""
    wall: float = 5.0
    """Time by the clock in seconds."""
    memory: int = 256
    """Address space in MiB; the interpreter itself takes about 30."""
    file: int = 1024
    """Size of one file in KiB."""
    files: int = 16
    """How often a file may be opened for writing or a folder made."""
    output: int = 64
    """What may be printed, in KiB."""
    descriptors: int = 32
    """Open files at a time."""


@dataclass(frozen=True)
class Program:
    """A program and the tests that judge it, one a line (``read_tests``)."""

    source: str
    tests: str


class Sandbox:
    """A pool of workers that judge programs.

    Workers start with the first program and stay; ``close`` (or the end of a ``with``) ends them.

    Args:
        limits: what one program may use.
        workers: programs at a time; 0 is one for each usable core.
        allow_weak: run programs even where the kernel isolates neither files nor the network. They can then read and
            send whatever this user can: only for programs that you have read.
        python: the interpreter, of this version; another one may be readable to nobody, where this one lies in root's
            home.
        without: layers to do without (landlock, filter, notify, namespaces), to see what the others hold.
    """

    def __init__(
        self,
        limits: SandboxLimits = SandboxLimits(),  # noqa: B008 (frozen)
        *,
        workers: int = 0,
        allow_weak: bool = False,
        python: str = sys.executable,
        without: tuple[str, ...] = (),
    ) -> None:
        self.limits = limits
        self.workers = workers or len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        self.allow_weak = allow_weak
        self.python = python
        self.without = without
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        self._started = 0

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def judge(self, programs: Sequence[Program]) -> list[Verdict]:
        """A verdict on each program, in order.

        Raises:
            UserError: a program's tests cannot be read, or this machine cannot isolate programs.
        """
        tests = [read_tests(program.tests) for program in programs]
        if not programs:
            return []
        while self._started < min(self.workers, len(programs)):
            self._idle.put(self._start())
            self._started += 1
        if self._started == 1:
            return [self._judge(program, wanted) for program, wanted in zip(programs, tests)]
        with ThreadPoolExecutor(self._started) as threads:
            return list(threads.map(self._judge, programs, tests))

    def layers(self) -> dict[str, str]:
        """The layers of isolation that are active here, in words, by what they protect.

        Raises:
            UserError: this machine cannot isolate programs.
        """
        worker = self._idle.get() if self._started else self._start()
        self._started = max(1, self._started)
        self._idle.put(worker)
        return describe(worker.layers)

    def close(self) -> None:
        """End the workers and remove their folders. The sandbox can be used again."""
        for _ in range(self._started):
            self._idle.get().close()
        self._started = 0

    def _start(self) -> WorkerProcess:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in ARCHITECTURES:
            raise UserError(
                "Programs are judged on Linux only (x86-64 or aarch64), whose kernel can isolate them; this is "
                f"{sys.platform} on {machine}: run it there, in a container or a virtual machine."
            )
        try:
            worker = WorkerProcess(self.python, self._settings())
        except (Lost, OSError) as error:
            raise UserError(
                f"The interpreter {self.python} does not start as a worker; give one of Python 3.10 or newer."
            ) from error
        missing = lacking(worker.layers)
        if missing and not self.allow_weak:
            worker.close()
            raise UserError(
                f"This kernel offers no isolation of {' and '.join(missing)} (Landlock, seccomp and network namespaces "
                "were tried), so no program that nobody has read is run: use Linux 5.13 or newer with Landlock, or set "
                "allow_weak for programs that you have read."
            )
        return worker

    def _settings(self) -> dict[str, Any]:
        limits = self.limits
        return {
            "without": list(self.without),
            "memory": limits.memory << 20,
            "processor": limits.processor,
            "wall": limits.wall,
            "file": limits.file << 10,
            "files": limits.files,
            "output": limits.output << 10,
            "descriptors": limits.descriptors,
        }

    def _judge(self, program: Program, tests: Sequence[Expectation]) -> Verdict:
        if len(program.source) > LONGEST_SOURCE or "\0" in program.source:
            return Verdict(Reason.EXCEPTION, f"no program of up to {LONGEST_SOURCE} characters", 0, len(tests), 0.0)
        for _ in range(2):  # a worker may have been lost without the program's doing
            worker = self._idle.get()
            try:
                return conclude(worker.run(program.source, [test.call for test in tests]), tests)
            except Lost:
                worker.close()
                worker = self._start()
            except BaseException:  # interrupted: the answer that is still to come must not be taken for the next one's
                worker.close()
                raise
            finally:
                self._idle.put(worker)
        return Verdict(Reason.CRASH, "its worker was lost with it, twice", 0, len(tests), 0.0)


def sandbox_layers() -> dict[str, str]:
    """What isolates programs on this machine, in words; one entry, "refused", where nothing is run."""
    try:
        with Sandbox(workers=1) as sandbox:
            return sandbox.layers()
    except UserError as error:
        return {"refused": str(error)}


def lacking(layers: Mapping[str, Any]) -> list[str]:
    """What no layer protects: files, network, or both."""
    files = bool(layers["landlock"])
    network = bool(layers["filter"]) or "network" in layers["namespaces"]
    return [name for name, there in (("files", files), ("the network", network)) if not there]


def describe(layers: Mapping[str, Any]) -> dict[str, str]:
    """A worker's layers in words."""
    none = "NOT ISOLATED"
    spaces = layers["namespaces"]
    user = "nobody" if layers["nobody"] else "root without capabilities" if layers["root"] else "this user"
    filtered = ["seccomp filter"] if layers["filter"] else []
    emptied = ["network namespace"] if "network" in spaces else []
    return {
        "files": f"Landlock, version {layers['landlock']}" if layers["landlock"] else none,
        "network": " and ".join(filtered + emptied) or none,
        "system calls": "seccomp filter" if layers["filter"] else none,
        "reasons": "seccomp listener" if layers["notify"] else "exit status only; programs write no files",
        "namespaces": ", ".join(spaces) or "none granted",
        "user": user,
        "limits": "processor, wall time, memory, file size, files, output",
    }
