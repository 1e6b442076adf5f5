"""Pictures of a distillation's course: the plane of proxy and golden, and the proxy with its power law.

They are PNG files in a run's ``pictures/``, captions beside them, which the report shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from preceptor.evaluation.power_law_picture import plain_ticks
from preceptor.report.figures import COLOURS, INK, bare, blank, save


def draw_plane(path: Path, courses: Mapping[str, Sequence[tuple[float, float]]], caption: str) -> None:
    """Golden over proxy, a line a course, from its first point (hollow) to its last (filled).

    A bar marks the least golden value. Without matplotlib nothing is drawn.

    Args:
        path: of the PNG.
        courses: name -> (proxy, golden) of each checkpoint, all positive, in nats.
        caption: what the report shows under it.
    """
    if (figure := blank()) is None:
        return
    axes = bare(figure.add_subplot(), grid=True)
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
    plain_ticks(axes)
    axes.set_xlabel("proxy: KL(teacher ‖ student), nats a sequence (training goes to the right)", color=INK, fontsize=8)
    axes.set_ylabel("golden: KL(oracle ‖ student)", color=INK, fontsize=8)
    if len(courses) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    save(figure, path, caption)
