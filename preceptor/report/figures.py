"""The look that every figure shares: size, axes, colours, and the PNG with its caption beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.files import write_whole

INK, GRID, FLAG = "#3b3f46", "#dfe1e5", "#b3261e"


COLOURS = ("#2f6f8f", "#c2703d", "#5b8c5a", "#8a5a9e", "#b8a13a", "#4f5d75", "#c2527a", "#3aa6a0", "#8c6d4f")


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    return Figure(figsize=(7.0, 4.2), layout="constrained", dpi=140)


def _axes(figure: Any) -> Any:
    axes = figure.add_subplot()
    axes.tick_params(which="both", colors=INK, length=0, labelsize=8)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return axes


def _write(figure: Any, path: Path, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    write_whole(path.with_suffix(".txt"), caption.strip() + "\n")
