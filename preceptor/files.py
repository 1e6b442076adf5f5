"""Files that are written whole or not at all, and a sentence where a disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from preceptor.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writable(folder: Path, what: str, partial: Path | None = None) -> Iterator[None]:
    """Turns what the disk refuses into one sentence, and removes the unfinished folder `partial`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in _FULL
        full = full or any(f"os error {number})" in str(error) for number in _FULL)
        if full:
            raise UserError(
                f"No room on the disk for {what} in {folder}: free some space and start again with --resume, "
                "which goes on from the last whole checkpoint."
            ) from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"Cannot write {what} in {folder} ({reason}): choose a folder that you may write.") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it: it is there whole or not at all."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.chmod(beside, 0o666 & ~_umask())  # mkstemp's own mode lets nobody else read the file
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        Path(beside).unlink(missing_ok=True)
        raise


def read_kept(path: Path) -> dict[str, dict[str, float]]:
    """The figures that a reproduction has kept of its arms so far; empty where the file is not there."""
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _umask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
