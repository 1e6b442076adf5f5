"""Pictures of a selection: what became of the questions, and how many rollouts of each were right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.methods.soft_bootstrapping.rollouts import Tried, statistics
from preceptor.report.figures import COLOURS, INK, PALE, bare, blank, save

FILL = COLOURS[0]


ENTITLED = {
    "1_outcomes": "What became of the questions: those kept have a right and a wrong rollout, and a verified answer to "
    "the hinted prompt.",
    "2_right_rollouts": "How many rollouts of a question were right. Only questions between none and all can be kept.",
}


def draw_selection(folder: Path, tried: Sequence[Tried]) -> None:
    """Writes the pictures, PNG with their captions beside them; nothing without matplotlib.

    Args:
        folder: where they go; it is made.
        tried: all questions that were tried.
    """
    for name, paint in (("1_outcomes", _outcomes), ("2_right_rollouts", _right)):
        if (figure := blank(6.4, 2.6)) is None:
            return
        paint(bare(figure.add_subplot()), tried)
        save(figure, folder / f"{name}.png", ENTITLED[name])


def _outcomes(axes: Any, tried: Sequence[Tried]) -> None:
    counts = {name: count for name, count in statistics(tried).outcomes.items() if count}
    bars = axes.barh(list(counts), list(counts.values()), color=[FILL if name == "kept" else PALE for name in counts])
    axes.bar_label(bars, padding=3, fontsize=8, color=INK)
    axes.invert_yaxis()
    axes.set_xticks([])


def _right(axes: Any, tried: Sequence[Tried]) -> None:
    spread, copies = statistics(tried).spread, max(len(one.rollouts) for one in tried)
    counts = [spread.get(right, 0) for right in range(copies + 1)]
    colours = [FILL if 0 < right < copies else PALE for right in range(copies + 1)]
    bars = axes.bar(range(copies + 1), counts, color=colours)
    axes.bar_label(bars, padding=2, fontsize=8, color=INK)
    axes.set_xticks(range(copies + 1))
    axes.set_yticks([])
    axes.set_xlabel(f"right rollouts of {copies}", fontsize=8, color=INK)
