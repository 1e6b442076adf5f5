"""The program's side of the sandbox: a process confines itself, runs one program and its calls, and ends.

What happens here can be forged by the program, and nothing here decides: the values are compared in the judge's
process, and why a program was stopped is recorded by the supervisor.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any, NoReturn

from preceptor.sandbox.kernel import Kernel, limit
from preceptor.sandbox.values import encode

PROGRAM = "program.py"


OUT_OF_MEMORY, NOT_CONFINED = 71, 72  # exit statuses


@dataclass(frozen=True)
class Ends:
    """The child's descriptors: for results, output and /dev/null, the way to the supervisor, Landlock's rules."""

    results: int
    output: int
    null: int
    supervisor: socket.socket
    rules: int | None


def run_program(source: str, calls: Sequence[str], ends: Ends, kernel: Kernel, settings: Mapping[str, Any]) -> NoReturn:
    """Confine this process, run the program, write what its calls give, one JSON line each, and end."""
    status = NOT_CONFINED
    try:
        _confine(ends, kernel, settings)
        status = 0
        _execute(source, calls, ends.results)
        with contextlib.suppress(Exception):  # the program may have replaced or closed it
            sys.stdout.flush()
    except MemoryError:
        status = OUT_OF_MEMORY
    except BaseException:  # the kernel refused a layer, or the program broke what reports of it
        status = status or 1
    finally:
        os._exit(status)


def _confine(ends: Ends, kernel: Kernel, settings: Mapping[str, Any]) -> None:
    kernel.die_with_parent()
    os.setsid()
    for descriptor, target in ((ends.null, 0), (ends.output, 1), (ends.output, 2)):
        os.dup2(descriptor, target)
    rules = [] if ends.rules is None else [ends.rules]
    kept = sorted([ends.results, ends.supervisor.fileno(), *rules])
    for low, high in zip([2, *kept], [*kept, 256]):
        os.closerange(low + 1, high)
    os.chdir(settings["folder"])
    random.seed(0)
    limit(
        memory=settings["memory"],
        processor=settings["processor"],
        file=settings["file"],
        descriptors=settings["descriptors"],
    )
    for ruleset in rules:
        kernel.landlock(ruleset)
        os.close(ruleset)
    if settings["filter"]:
        listener = kernel.filter(notify=settings["notify"])
        if listener:
            message = array.array("i", [listener])
            ends.supervisor.sendmsg([b"1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, message)])
            os.close(listener)
    ends.supervisor.close()


def _execute(source: str, calls: Sequence[str], results: int) -> None:
    """Run a program and its calls; a line of JSON for each, or one for the error before them."""
    module = ModuleType("program")  # where dataclasses and typing look up what an annotation names
    sys.modules[module.__name__] = module
    namespace = module.__dict__
    try:
        exec(compile(source, PROGRAM, "exec"), namespace)
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit too: the judge decides
        _tell(results, _described(error))
        return
    for call in calls:
        try:
            result: dict[str, Any] = {"value": encode(eval(call, namespace))}
        except MemoryError:
            raise
        except BaseException as error:
            result = _described(error)
        _tell(results, result)


def _tell(results: int, result: dict[str, Any]) -> None:
    line = json.dumps(result).encode() + b"\n"
    while line:
        line = line[os.write(results, line) :]


def _described(error: BaseException) -> dict[str, Any]:
    """An exception with the last line of the program that it passed through."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        frame: FrameType = trace.tb_frame
        if frame.f_code.co_filename == PROGRAM:
            line = trace.tb_lineno
        trace = trace.tb_next
    return {"error": type(error).__name__, "message": str(error)[:300], "line": line}
