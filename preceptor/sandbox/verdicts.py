"""Verdicts: what became of a program, and why."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from preceptor.sandbox.values import Expectation, decode, equal

_OUT_OF_MEMORY, _NOT_CONFINED = 71, 72  # the child's exit statuses


class Reason(str, Enum):
    """Why a program passed or failed. The value is the words of a report."""

    PASSED = "passed"
    FAILED = "failed a test"
    EXCEPTION = "raised an exception"
    TIME = "ran out of time"
    MEMORY = "ran out of memory"
    OUTPUT = "wrote too much output"
    DISK = "wrote too much to disk"
    FILE = "opened a file outside its folder"
    SOCKET = "opened a socket"
    PROCESS = "started a process"
    THREAD = "started a thread"
    SIGNAL = "sent a signal to another process"
    TRACE = "reached into another process"
    LINK = "made a link"
    SYSTEM = "asked the kernel for what a program may not have"
    EXIT = "ended itself before its tests were done"
    CRASH = "crashed"


@dataclass(frozen=True)
class Verdict:
    """What became of a program.

    ``detail``: the exception with its line, the test with what it gave, the path that was opened, ... ``right``: tests
    that gave what was expected, of ``tests``. ``seconds``: wall time. ``output``: the beginning of what it printed.
    """

    reason: Reason
    detail: str
    right: int
    tests: int
    seconds: float
    output: str = ""

    @property
    def passed(self) -> bool:
        """Whether every test gave what was expected, and nothing forbidden was tried."""
        return self.reason is Reason.PASSED

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


def conclude(record: Mapping[str, Any], tests: Sequence[Expectation]) -> Verdict:
    """The verdict on a program from what the worker tells of it: compare its values with what was expected."""
    lines = [line for line in str(record["results"]).split("\n") if line]
    marks = [_mark(line, test) for line, test in zip(lines, tests)]
    right = sum(reason is Reason.PASSED for reason, _ in marks)
    failures = [mark for mark in marks if mark[0] is not Reason.PASSED]
    if record["why"]:
        reason, detail = Reason[record["why"].upper()], str(record["detail"])
    elif (ended := _ended(int(record["status"]))) is not None:
        reason, detail = ended
    elif failures:
        reason, detail = failures[0]
    elif len(lines) != len(tests):
        reason, detail = Reason.EXIT, f"{len(lines)} of {len(tests)} calls were answered"
    else:
        reason, detail = Reason.PASSED, ""
    detail = detail.encode("utf-8", "backslashreplace").decode()  # a lone surrogate could not be printed
    return Verdict(reason, detail, right, len(tests), float(record["seconds"]), str(record["output"]))


def _ended(status: int) -> tuple[Reason, str] | None:
    """What an exit status other than 0 says."""
    if status == 0:
        return None
    if status == _OUT_OF_MEMORY or status == -signal.SIGKILL:
        return Reason.MEMORY, ""
    if status == _NOT_CONFINED:
        return Reason.CRASH, "it could not be confined, and was not run"
    if status == -signal.SIGXCPU:
        return Reason.TIME, "of the processor"
    if status == -signal.SIGSYS:
        return Reason.SYSTEM, "a forbidden system call"
    if status < 0:
        return Reason.CRASH, f"signal {-status}"
    return Reason.EXIT, f"exit status {status}"


def _mark(line: str, test: Expectation) -> tuple[Reason, str]:
    """What one line of the results says of one test. A line can hold anything: the program can write lines too."""
    try:
        record = json.loads(line, parse_int=lambda digits: int(digits[:12]))
        if "error" in record:
            return _error(str(record["error"])[:80], str(record["message"])[:300], record["line"])
        given = decode(record["value"])
        same = equal(test.expected, given)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Reason.FAILED, f"{test.call} gave nothing that can be read"
    if same:
        return Reason.PASSED, ""
    return Reason.FAILED, f"{test.call} gave {_short(given)}, not {_short(test.expected)}"


def _error(name: str, message: str, line: Any) -> tuple[Reason, str]:
    reason = {"SystemExit": Reason.EXIT, "MemoryError": Reason.MEMORY}.get(name, Reason.EXCEPTION)
    place = f"line {line}: " if isinstance(line, int) else ""
    return reason, f"{place}{name}: {message}" if message else f"{place}{name}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes
        return "a very long value"
    return text if len(text) <= 80 else f"{text[:77]}..."
