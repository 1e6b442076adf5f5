"""What a run measures: one line for each step in ``metrics.jsonl``."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from preceptor.files import writable

Line = dict[str, float | int | str | None]


class Metrics:
    """``metrics.jsonl``: lines are held back for at most a second, and never past a checkpoint."""

    def __init__(self, path: Path, *, length: int = 0) -> None:
        """Opens the file and cuts it to `length` bytes: those that stood there at the checkpoint resumed from."""
        with writable(path.parent, path.name):
            self._file: IO[bytes] = path.open("ab")
            self._file.truncate(min(length, path.stat().st_size))
        self._folder = path.parent
        self._held: list[str] = []
        self._flushed = time.monotonic()

    def write(self, line: Mapping[str, float | int | str | None]) -> None:
        """Adds one line; a number that JSON does not know (infinite, not a number) is written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._held.append(json.dumps(clean))
        if time.monotonic() - self._flushed > 1.0:
            self.flush()

    def flush(self, *, to_disk: bool = False) -> int:
        """Hands the held lines to the system (to the disk itself if asked); returns the file's length in bytes."""
        with writable(self._folder, "metrics.jsonl"):
            if self._held:
                self._file.write(("\n".join(self._held) + "\n").encode())
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())
        self._held.clear()
        self._flushed = time.monotonic()
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self.flush()
        self._file.close()
