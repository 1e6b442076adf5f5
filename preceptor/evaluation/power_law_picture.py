"""A picture of a run's distance to its teacher, with the power law that was fitted to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preceptor.evaluation.power_law import PowerLawVerdict
from preceptor.report.figures import COLOURS, FLAG, INK, bare, blank, save


def draw_law(path: Path, points: Sequence[tuple[int, float]], verdict: PowerLawVerdict, caption: str) -> None:
    """The proxy over the steps in log-log, the law that was fitted, and the step from which it is left, if any.

    Args:
        path: of the PNG.
        points: (step, proxy), positive, step 0 left out.
        verdict: what the detector found.
        caption: what the report shows under it.
    """
    shown = [(step, value) for step, value in points if step > 0 and value > 0]
    if not shown or (figure := blank()) is None:
        return
    axes = bare(figure.add_subplot(), grid=True)
    steps = [step for step, _ in shown]
    axes.plot(
        steps, [value for _, value in shown], "o-", color=COLOURS[0], linewidth=1.2, markersize=3.5, label="proxy"
    )
    if verdict.sufficient:
        law = [verdict.expected(step) for step in steps]
        axes.plot(steps, law, "--", color=INK, linewidth=1.0, label="power law of the first checkpoints")
    if verdict.flagged is not None:
        axes.axvline(verdict.flagged, color=FLAG, linewidth=1.2, label=f"departs at step {verdict.flagged}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes)
    axes.set_xlabel("optimizer step", color=INK, fontsize=8)
    axes.set_ylabel("proxy on held-out prompts", color=INK, fontsize=8)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    save(figure, path, caption)


def plain_ticks(axes: Any) -> None:
    """Numbers as 0.5 or 200: a range of less than a decade has no powers of ten to show."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
