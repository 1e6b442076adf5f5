"""The files an evaluation leaves beside a student: ``result.json`` and ``samples.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.files import write_whole
from preceptor.report.table import Table


def write_result(
    folder: Path, table: Table, answers: list[dict[str, Any]] | None = None, *, headline: str = "", command: str = ""
) -> None:
    """Write ``result.json`` (the table, a headline, the command that repeats it) and ``samples.json``.

    Each is written whole or not at all; the ones that were there stay beside them as ``*.previous.json``.

    Raises:
        UserError: the folder cannot be written.
    """
    _writable(folder).mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"table": table.json(), "headline": headline, "command": command}
    _replace(folder / "result.json", {name: value for name, value in result.items() if value})
    if answers is not None:
        _replace(folder / "samples.json", answers)


def _replace(path: Path, value: object) -> None:
    if path.exists():
        os.replace(path, path.with_suffix(".previous.json"))
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _writable(folder: Path) -> Path:
    """The folder, which need not exist yet, if it can be written; nothing is made here."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{folder} cannot be written: choose another folder with --output.")
    return folder
