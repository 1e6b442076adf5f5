"""The look that every figure shares: size, axes, colours, and the PNG with its caption beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.files import write_whole

INK, GRID, PALE, FLAG = "#3b3f46", "#dfe1e5", "#c9ccd1", "#b3261e"


COLOURS = ("#2f6f8f", "#c2703d", "#5b8c5a", "#8a5a9e", "#b8a13a", "#4f5d75", "#c2527a", "#3aa6a0", "#8c6d4f", "#777777")


def blank(width: float = 7.0, height: float = 4.2) -> Any:
    """An empty matplotlib figure of a size in inches, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    return Figure(figsize=(width, height), layout="constrained", dpi=140)


def bare(axes: Any, *, grid: bool = False) -> Any:
    """The axes without a frame and without tick marks; with ``grid``, lines behind the data."""
    axes.tick_params(which="both", colors=INK, length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    if grid:
        axes.grid(color=GRID, linewidth=0.6)
    return axes


def save(figure: Any, path: Path, caption: str) -> None:
    """Write the PNG and, beside it, its caption (``.txt``) as a run's page shows it; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    write_whole(path.with_suffix(".txt"), caption.strip() + "\n")
