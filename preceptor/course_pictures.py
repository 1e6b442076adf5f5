"""Pictures of a distillation's course: the plane of proxy and golden, and the proxy with its power law.

They are PNG files in a run's ``pictures/``, captions beside them, which the report shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.departure import Verdict
from preceptor.folder import write_whole

INK, GRID, FLAG = "#3b3f46", "#dfe1e5", "#b3261e"
COLOURS = ("#2f6f8f", "#c2703d", "#5b8c5a", "#8a5a9e", "#b8a13a", "#4f5d75", "#c2527a", "#3aa6a0", "#8c6d4f")


def draw_plane(path: Path, courses: Mapping[str, Sequence[tuple[float, float]]], caption: str) -> None:
    """Golden over proxy, a line a course, from its first point (hollow) to its last (filled).

    A bar marks the least golden value. Without matplotlib nothing is drawn.

    Args:
        path: of the PNG.
        courses: name -> (proxy, golden) of each checkpoint, all positive, in nats.
        caption: what the report says under it.
    """
    if (figure := _figure()) is None:
        return
    axes = _axes(figure)
    for (name, points), colour in zip(courses.items(), COLOURS * (1 + len(courses) // len(COLOURS))):
        x, y = [proxy for proxy, _ in points], [golden for _, golden in points]
        axes.plot(x, y, color=colour, linewidth=1.5, label=name)
        axes.plot(x[:1], y[:1], "o", color=colour, markerfacecolor="white", markersize=5)
        axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=6)
        least = min(range(len(y)), key=y.__getitem__)
        axes.plot(x[least : least + 1], y[least : least + 1], "_", color=colour, markersize=12, markeredgewidth=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.invert_xaxis()
    _plain_ticks(axes)
    axes.set_xlabel("proxy: KL(teacher ‖ student), nats a sequence (training goes to the right)", color=INK, fontsize=8)
    axes.set_ylabel("golden: KL(oracle ‖ student)", color=INK, fontsize=8)
    if len(courses) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    _write(figure, path, caption)


def draw_law(path: Path, points: Sequence[tuple[int, float]], verdict: Verdict, caption: str) -> None:
    """The proxy over the steps in log-log, the law that was fitted, and the step from which it is left, if any.

    Args:
        path: of the PNG.
        points: (step, proxy), positive, step 0 left out.
        verdict: what the detector found.
        caption: what the report says under it.
    """
    shown = [(step, value) for step, value in points if step > 0 and value > 0]
    if not shown or (figure := _figure()) is None:
        return
    axes = _axes(figure)
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
    _plain_ticks(axes)
    axes.set_xlabel("optimizer step", color=INK, fontsize=8)
    axes.set_ylabel("proxy on held-out prompts", color=INK, fontsize=8)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    _write(figure, path, caption)


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


def _plain_ticks(axes: Any) -> None:
    """Numbers as 0.5 or 200: a range of less than a decade has no powers of ten to show."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _write(figure: Any, path: Path, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    write_whole(path.with_suffix(".txt"), caption.strip() + "\n")
