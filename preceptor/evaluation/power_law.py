"""Does a run leave the course that it began? A power law is fitted to the first checkpoints, and what departs is found.

Source: On Teacher Hacking in Language Model Distillation (Tiapkin et al., ICML 2025, https://arxiv.org/abs/2502.02671),
who see that the distance to the teacher of a healthy run follows proxy(s) ≈ C s^(-a), a straight line in log-log, and a
hacked one leaves it. They give no procedure; this one is decided here:

    log proxy(s) = c - a log s        by least squares on a window of at least 6 checkpoints

the first ones after the warm-up, while the learning rate is constant (a rate that decays bends the line by itself). A
checkpoint after the window departs when its residual exceeds 3 standard errors of a prediction (which grow with the
distance from the window) and it lies more than 10 % off the law; the flag stands at the first of 3 departing ones in a
row. Both bounds are needed: no run follows its law exactly, and where the proxy has little noise 3 standard errors are
so small that the slight curvature of a healthy run exceeds them. Both are two-sided: a curve that falls faster than its
law departs from it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from preceptor.engine.settings import Training
from preceptor.errors import UserError

FEWEST = 6  # checkpoints that a fit needs


IN_A_ROW = 3


NEEDED = FEWEST + IN_A_ROW  # checkpoints that a verdict needs


INSUFFICIENT = "insufficient data"


@dataclass(frozen=True)
class WatchBounds:
    """How closely a run is watched."""

    window: float = 0.4
    """Share of the checkpoints at a constant rate that the law is fitted to, at least 6 of them."""
    residual: float = 3.0
    """Standardised residual beyond which a checkpoint departs."""
    relative: float = 0.1
    """Least relative deviation from the law that counts as a departure; 0 leaves it to the residual alone."""

    def __post_init__(self) -> None:
        """Refuse bounds that mean nothing."""
        if not 0 < self.window < 1:
            raise UserError(f"The window of a watch is {self.window}; choose a share of the checkpoints in (0, 1).")
        if not self.residual > 0 or self.relative < 0:
            raise UserError(
                f"A watch has the bounds residual {self.residual} and relative {self.relative}: the first must be "
                "above 0, the second 0 or more."
            )


@dataclass(frozen=True)
class PowerLawVerdict:
    """What was found: the law's exponent a, its c and the R² of the fit, and the step from which the run departs.

    ``above``: of a run that departs, on which side of its law the first departing checkpoint lies.
    ``rising``: the proxy ends above its least value by more than the fit's own scatter, which is overfitting.
    ``fitted`` and ``judged``: how many checkpoints were. ``reason`` is ``"insufficient data: ..."`` when there is no
    verdict (the other fields are None then), else empty.
    """

    exponent: float | None = None
    intercept: float | None = None
    r_squared: float | None = None
    flagged: int | None = None
    above: bool = False
    rising: bool = False
    fitted: int = 0
    judged: int = 0
    reason: str = ""

    @property
    def sufficient(self) -> bool:
        """Whether there is a verdict at all."""
        return not self.reason

    def expected(self, step: float) -> float:
        """The law's value at a step.

        Raises:
            ValueError: there is no law.
        """
        if self.intercept is None or self.exponent is None:
            raise ValueError(self.reason)
        return math.exp(self.intercept - self.exponent * math.log(step))

    def __str__(self) -> str:
        """One sentence."""
        if self.reason:
            return f"No verdict: {self.reason}."
        law = f"C · step^(-{self.exponent:.3g}) (R² {self.r_squared:.3f} over {self.fitted} checkpoints)"
        if self.flagged is not None:
            rising = " It rises, on held-out prompts: the student overfits." if self.rising else ""
            side = "above" if self.above else "below"
            return f"The proxy leaves its power law {law} from step {self.flagged} on, and lies {side} it.{rising}"
        return f"The proxy keeps to its power law {law} in the {self.judged} after them."


@dataclass(frozen=True)
class Line:
    """Least squares of y on x: y ≈ intercept + slope x, with the residuals' standard deviation (n - 2 degrees)."""

    slope: float
    intercept: float
    r_squared: float
    deviation: float
    count: int
    middle: float
    spread: float

    def error(self, x: float) -> float:
        """Standard error of a new observation at x: s √(1 + 1/n + (x - x̄)² / Σ(x_i - x̄)²)."""
        return self.deviation * math.sqrt(1 + 1 / self.count + (x - self.middle) ** 2 / self.spread)


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The line of least squares through at least 3 points of which two have different x."""
    n = len(x)
    middle, level = math.fsum(x) / n, math.fsum(y) / n
    spread = math.fsum((a - middle) ** 2 for a in x)
    slope = math.fsum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / spread
    intercept = level - slope * middle
    left = math.fsum((b - intercept - slope * a) ** 2 for a, b in zip(x, y))
    whole = math.fsum((b - level) ** 2 for b in y)
    r_squared = 1 - left / whole if whole > 0 else 1.0
    return Line(slope, intercept, r_squared, math.sqrt(left / (n - 2)), n, middle, spread)


def constant_part(points: Sequence[tuple[int, float]], training: Training, total: int) -> list[tuple[int, float]]:
    """The points (step, value) that were taken after the warm-up at a constant learning rate.

    A schedule that decays has none: its rate bends the line.
    """
    if training.schedule != "constant":
        return []
    warm = training.warmup * total if training.warmup < 1 else training.warmup
    return [(step, value) for step, value in points if step > warm]


def readable(training: Training, total: int) -> int:
    """How many evaluations of a run of ``total`` steps a watch reads; ``NEEDED`` of them are enough for a verdict."""
    every = training.evaluate_every
    steps = {*range(every, total + 1, every), total} if every else set[int]()
    return len(constant_part([(step, 1.0) for step in sorted(steps)], training, total))


def law_r_squared(points: Sequence[tuple[int, float]]) -> float | None:
    """R² of one power law through all points; None where they are fewer than 6 or one is not positive."""
    if _insufficient(points, FEWEST):
        return None
    return _fit(points).r_squared


def find_departure(points: Sequence[tuple[int, float]], watch: WatchBounds = WatchBounds()) -> PowerLawVerdict:
    """Fit the law on the first points and judge those after them.

    Args:
        points: (step, proxy), at a constant learning rate and after the warm-up (``constant_part``), steps ascending.
        watch: window and bounds.

    Returns:
        A `PowerLawVerdict`; "insufficient data" with fewer than 6 points to fit and 3 to judge, or a value that is not
        a positive finite number.
    """
    if why := _insufficient(points, NEEDED):
        return PowerLawVerdict(reason=f"{INSUFFICIENT}: {why}")
    size = min(max(FEWEST, round(watch.window * len(points))), len(points) - IN_A_ROW)
    line = _fit(points[:size])
    rising = _rise([value for _, value in points]) > watch.residual * line.deviation
    verdict = PowerLawVerdict(
        -line.slope, line.intercept, line.r_squared, rising=rising, fitted=size, judged=len(points) - size
    )
    run = 0
    for place, (step, value) in enumerate(points[size:], size):
        x, gap = math.log(step), math.log(value) - line.intercept - line.slope * math.log(step)
        # A fit without any residual at all would flag the rounding of exact numbers.
        certain = abs(gap) > max(watch.residual * line.error(x), 1e-9)
        run = run + 1 if certain and abs(math.expm1(gap)) > watch.relative else 0
        if run == IN_A_ROW:
            left, first = points[place - IN_A_ROW + 1]
            return replace(verdict, flagged=left, above=first > verdict.expected(left))
    return verdict


def _fit(points: Sequence[tuple[int, float]]) -> Line:
    return fit_line([math.log(step) for step, _ in points], [math.log(value) for _, value in points])


def _rise(values: Sequence[float]) -> float:
    """How far, in logarithms, the last 3 values lie above the least mean of 3 in a row."""
    means = [math.fsum(values[start : start + IN_A_ROW]) for start in range(len(values) - IN_A_ROW + 1)]
    return math.log(means[-1] / min(means))


def _insufficient(points: Sequence[tuple[int, float]], fewest: int) -> str:
    bad = [step for step, value in points if not (math.isfinite(value) and value > 0)]
    if bad:
        return f"the value at step {bad[0]} is not a positive number, so it has no logarithm"
    if len({step for step, _ in points if step > 0}) < max(fewest, len(points)):
        return f"{len(points)} checkpoints after step 0 at a constant rate, and at least {fewest} are needed"
    return ""


class Watcher:
    """Watches the proxy of one run while it goes: a checkpoint at a time, kept over a resume by ``Run.remember``.

    Args:
        training: the run's settings; only its constant-rate part is read.
        watch: window and bounds.
    """

    def __init__(self, training: Training, watch: WatchBounds = WatchBounds()) -> None:
        self.training, self.watch = training, watch
        self.points: list[tuple[int, float]] = []
        self.total = 0

    @property
    def verdict(self) -> PowerLawVerdict:
        """The verdict on the checkpoints so far."""
        return find_departure(constant_part(self.points, self.training, self.total), self.watch)

    def see(self, step: int, proxy: float, *, total: int) -> PowerLawVerdict:
        """Take one checkpoint of a run of ``total`` steps, and judge the run so far."""
        self.points.append((step, proxy))
        self.total = total
        return self.verdict

    def state_dict(self) -> dict[str, Any]:
        """The checkpoints seen, and the steps of the whole run."""
        return {"points": [list(point) for point in self.points], "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.points = [(int(step), float(proxy)) for step, proxy in state["points"]]
        self.total = state["total"]
