"""Write a run's page: curves, the table, samples side by side, settings, and how to repeat it, in one HTML file.

preceptor report runs/gkd/run
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from preceptor.report import write_report


@dataclass(frozen=True)
class Config:
    """Which folder to report on."""

    folder: Positional[Path]
    """The folder of a run, of an evaluation or of a reproduction."""


def main(config: Config) -> None:
    """Write the page and print its path."""
    print(f"The page: {write_report(config.folder)}")
