"""A worker process, seen from the process that judges."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import struct
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START = (
    "import sys; sys.path[:] = [*filter(None, sys.path), sys.argv[1]]; "
    "from preceptor.sandbox import worker; worker.main(sys.argv[2])"
)


ENVIRONMENT = {"PYTHONHASHSEED": "0", "TZ": "UTC0", "LC_ALL": "C.UTF-8"}


PATIENCE = 30.0  # seconds beyond a program's own time, after which its worker is given up


class Lost(Exception):
    """The worker ended, or does not answer."""


class WorkerProcess:
    """A worker with its private folder.

    Attributes:
        layers: what isolates its programs, as ``Worker.confine`` tells.

    Raises:
        Lost: it does not start.
    """

    def __init__(self, python: str, settings: Mapping[str, Any]) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="preceptor-sandbox-")).resolve()
        self.wall = float(settings["wall"])
        root = str(Path(__file__).resolve().parents[2])
        options = json.dumps({**settings, "folder": str(self.folder)})
        self.process = subprocess.Popen(
            [python, "-s", "-S", "-B", "-c", START, root, options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=ENVIRONMENT,
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self.process, self.folder)
        try:
            self.layers: dict[str, Any] = self._receive(PATIENCE)
        except Lost:
            self.close()
            raise

    def run(self, source: str, calls: Sequence[str]) -> dict[str, Any]:
        """What became of a program, as ``Worker.run`` tells.

        Raises:
            Lost: the worker ended or does not answer.
        """
        body = json.dumps({"source": source, "calls": list(calls)}).encode()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(struct.pack(">I", len(body)) + body)
            self.process.stdin.flush()
        except (OSError, ValueError) as error:  # it has ended, or was closed
            raise Lost from error
        return self._receive(self.wall + PATIENCE)

    def close(self) -> None:
        """End the worker and remove its folder."""
        self._end()

    def _receive(self, patience: float) -> dict[str, Any]:
        deadline = time.monotonic() + patience
        (length,) = struct.unpack(">I", self._read(4, deadline))
        reply: dict[str, Any] = json.loads(self._read(length, deadline))
        return reply

    def _read(self, count: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        source = self.process.stdout.fileno()
        held = b""
        while len(held) < count:
            ready, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(source, count - len(held)) if ready else b""
            if not piece:
                raise Lost
            held += piece
        return held


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)
