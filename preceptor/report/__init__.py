"""A run's page: curves, the table, samples side by side, settings, and how to repeat it, in one HTML file."""

from __future__ import annotations

import os
from pathlib import Path

from preceptor.errors import UserError
from preceptor.report.contents import method_of_run, read_contents
from preceptor.report.page import render

__all__ = ["method_of_run", "write_report"]


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` into a folder, one page without any outside request, and return its path.

    It shows what is there: a run that is not finished, or one without samples, gets a shorter page. Everything read
    from the folder is escaped. The curves need matplotlib (the extra ``report``); without it the page names the extra.

    Raises:
        UserError: no such folder, nothing of a run in it, a file that is not what a run writes, or no permission.
    """
    folder = Path(folder)
    text = render(read_contents(folder))
    path = folder / "report.html"
    beside = folder / ".report.html.part"
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path} cannot be written ({reason}): make room, or set permissions.") from error
    return path
