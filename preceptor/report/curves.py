"""Small line charts as inline SVG that takes its colours and its type from the page, in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from preceptor.report.figures import blank

POINTS = 300  # of a line at most; longer ones are averaged in buckets


INK, LINE, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"  # stand for the page's colours


COLOURS = {INK: "var(--soft)", LINE: "var(--line)", FIRST: "var(--first)", SECOND: "var(--second)"}


TITLES = {
    "loss": "Loss",
    "divergence": "Divergence from the teacher",
    "cross_entropy": "Cross-entropy to the labels",
    "student_entropy": "Entropy of the student",
    "teacher_entropy": "Entropy of the teacher",
    "agreement": "Agreement with the teacher",
    "gradient_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "count_per_second": "Tokens (or rows) a second",
    "items_per_second": "Examples a second",
    "memory_mib": "Memory, MiB",
}


LAST = ("gradient_norm", "learning_rate", "count_per_second", "items_per_second", "memory_mib")


UNDRAWN = ("step", "count", "evaluation")


HELD_OUT = "held_out_"


@dataclass(frozen=True)
class Series:
    """Points (step, value) with finite values, in order of the steps."""

    steps: list[float]
    values: list[float]


@dataclass(frozen=True)
class Curve:
    """One chart: a measure of the training steps, and the same on held-out text where it was taken."""

    title: str
    training: Series
    held_out: Series


def collect(metrics: list[dict[str, float]]) -> list[Curve]:
    """The charts of a run: the loss and its parts, what was held out, the machine; no constant, no line twice."""
    names = dict.fromkeys(name for line in metrics for name in line if name not in UNDRAWN)
    paired = {name for name in names if name.startswith(HELD_OUT) and name.removeprefix(HELD_OUT) in names}
    order = sorted(
        (n for n in names if n not in paired), key=lambda n: (n in LAST, n != "loss", n.startswith(HELD_OUT))
    )
    curves, drawn = [], list[Series]()
    for name in order:
        series = _series(metrics, name)
        if any(_same(series, other) for other in drawn):
            continue
        drawn.append(series)
        held_out = name.startswith(HELD_OUT)
        beside = _series(metrics, HELD_OUT + name) if HELD_OUT + name in paired else Series([], [])
        if len(set(series.values)) > 1 or beside.steps:
            empty = Series([], [])
            curves.append(Curve(title(name), empty if held_out else series, series if held_out else beside))
    return curves


def title(name: str) -> str:
    """A measure's name in plain words."""
    if name.startswith(HELD_OUT):
        return "Held out: " + title(name.removeprefix(HELD_OUT)).lower()
    return TITLES.get(name, name.replace("_", " ").capitalize())


def draw(curve: Curve) -> str:
    """A chart as an ``<svg>`` element without script, style sheet or outside reference.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style = {"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.size": 9, "axes.linewidth": 0.6}
    with rc_context(style):  # type: ignore[arg-type]
        figure = blank(4.4, 2.3)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _plot(axes, curve)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(LINE)
        axes.grid(axis="y", color=LINE, linewidth=0.6)
        axes.tick_params(colors=INK, length=0, labelcolor=INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.set_xlabel("step", color=INK)
        axes.margins(x=0.01)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(text.getvalue(), curve.title)


def _plot(axes: object, curve: Curve) -> None:
    steps, values = _thin(curve.training)
    noisy = _noisy(values)
    lines = [(steps, values, FIRST, 0.8 if noisy else 1.6, 0.35 if noisy else 1.0, "")]
    if noisy:
        lines.append((steps, _smooth(values), FIRST, 1.7, 1.0, ""))
    lines.append((curve.held_out.steps, curve.held_out.values, SECOND, 1.4, 1.0, "o"))
    for x, y, colour, width, opacity, marker in lines:
        if x:
            axes.plot(x, y, color=colour, linewidth=width, alpha=opacity, marker=marker, markersize=3.5)  # type: ignore[attr-defined]


def _series(metrics: Iterable[dict[str, float]], name: str) -> Series:
    points = [(line["step"], line[name]) for line in metrics if name in line and math.isfinite(line[name])]
    return Series([step for step, _ in points], [value for _, value in points])


def _thin(series: Series) -> tuple[list[float], list[float]]:
    """At most ``POINTS`` points, each the mean of a bucket."""
    size = math.ceil(len(series.steps) / POINTS) or 1
    buckets = range(0, len(series.steps), size)
    return (
        [math.fsum(part) / len(part) for part in (series.steps[start : start + size] for start in buckets)],
        [math.fsum(part) / len(part) for part in (series.values[start : start + size] for start in buckets)],
    )


def _same(one: Series, other: Series) -> bool:
    """Whether two lines are one, as the loss and its only part are, but for rounding."""
    if one.steps != other.steps:
        return False
    return all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(one.values, other.values))


def _noisy(values: list[float]) -> bool:
    """Whether a line goes up and down much more than it goes anywhere."""
    moves = math.fsum(abs(after - before) for before, after in zip(values, values[1:]))
    return len(values) > 20 and moves > 3 * (max(values) - min(values))


def _smooth(values: list[float]) -> list[float]:
    """A centred mean over about a fifteenth of the line, shorter at its ends: it does not lag behind."""
    reach = max(1, len(values) // 30)
    near = (values[max(0, place - reach) : place + reach + 1] for place in range(len(values)))
    return [math.fsum(part) / len(part) for part in near]


def _for_page(svg: str, label: str) -> str:
    """The bare element: size, colours and type from the page, ids only where something refers to them."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    referred = set(re.findall(r"#([A-Za-z][\w-]*)", svg)) - {colour[1:] for colour in COLOURS}
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font: \1px var(--sans)", svg)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    viewed = re.search(r'viewBox="[^"]*"', svg)
    safe = re.sub(r"[^\w ,()-]", "", label)
    opening = f'<svg role="img" aria-label="{safe}" {viewed[0] if viewed else ""}>'
    return opening + svg[svg.index(">") + 1 :].strip()
