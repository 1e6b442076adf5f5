"""Measured values: means with standard errors, intervals, comparisons of arms, and the claims that rest on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from preceptor.errors import UserError


def interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a binomial share by Wilson's score (Wilson, 1927): it stays in [0, 1] at the ends too.

    Raises:
        UserError: nothing was counted.
    """
    if count < 1:
        raise UserError("A share of no answers has no interval: ask at least one question.")
    z = 1.959964
    share, scale = right / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Value:
    """A measured mean, its standard error (None: not known, or a single measurement) and how many units it is over."""

    mean: float
    error: float | None = None
    count: int | None = None

    def __str__(self) -> str:
        """Write as many digits as the standard error supports: ``0.396 ± 0.004``."""
        return format_cell(self)


Cell = Value | float | int | str | None


Arm = Mapping[int, float] | Sequence[float] | Value


@dataclass(frozen=True)
class Claim:
    """A sentence that a table supports or not, the figure that decides it, and whether it holds."""

    text: str
    figure: str
    holds: bool


class Comparison(NamedTuple):
    """The difference ``ours - theirs`` of two arms with its standard error, whether it is paired, and the claim."""

    difference: Value
    paired: bool
    claim: Claim


def mean_of(values: Sequence[float]) -> Value:
    """The mean of independent measurements (seeds, sequences) and its standard error, from n - 1 degrees of freedom.

    Raises:
        UserError: there is no value.
    """
    count = len(values)
    if count == 0:
        raise UserError("There is nothing to take a mean of; run at least one seed.")
    mean = math.fsum(values) / count
    if count == 1:
        return Value(mean, None, 1)
    squares = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Value(mean, math.sqrt(squares / count), count)


def ratio_of(sums: Sequence[float], counts: Sequence[float]) -> Value:
    """A mean per token with its standard error over sequences: each sequence is a cluster of dependent tokens.

    The mean is R = Σ sums / Σ counts, the error the linearised one of a ratio estimator with n clusters,
    √(n/(n-1) · Σ (sums_i - R · counts_i)²) / Σ counts (Cochran, Sampling Techniques, 1977, eq. 6.9 without the finite
    population correction). ``count`` is n, the number of sequences that have tokens.

    Raises:
        UserError: there is no token.
    """
    kept = [(total, n) for total, n in zip(sums, counts, strict=True) if n > 0]
    tokens = math.fsum(n for _, n in kept)
    if not kept:
        raise UserError("No sequence has a response token to evaluate; give data that hold answers.")
    mean = math.fsum(total for total, _ in kept) / tokens
    clusters = len(kept)
    if clusters == 1 or not math.isfinite(mean):
        return Value(mean, None, clusters)
    squares = math.fsum((total - mean * n) ** 2 for total, n in kept)
    return Value(mean, math.sqrt(squares * clusters / (clusters - 1)) / tokens, clusters)


def compare(
    ours: Arm,
    theirs: Arm,
    text: str,
    *,
    better: Literal["lower", "higher"] = "lower",
    errors: float = 2.0,
) -> Comparison:
    """Compare two arms; the claim holds when ours is better by more than ``errors`` standard errors of the difference.

    Mappings seed -> figure with the same seeds, and sequences of equal length (the same seeds in the same order), are
    compared pair by pair, s.e. = sd(differences)/√n; other seeds, and two Values, as independent samples, with the two
    errors added in squares. Without a standard error (one seed) the claim does not hold.

    Args:
        ours: figures of the arm that should be better.
        theirs: figures of the arm that it is compared with.
        text: the claim in words.
        better: whether lower or higher figures are better.
        errors: how many standard errors the difference must exceed.

    Raises:
        UserError: an arm is empty.
    """
    pairs = _pairs(ours, theirs)
    difference = mean_of([a - b for a, b in pairs]) if pairs else _minus(_mean(ours), _mean(theirs))
    gain = -difference.mean if better == "lower" else difference.mean
    error = difference.error
    holds = error is not None and gain > errors * error and gain > 0
    if error is None:
        figure = f"difference {format_cell(difference)}, no standard error: run at least two seeds"
    elif error == 0:
        figure = f"difference {format_cell(difference)}, without spread"
    else:
        figure = f"difference {format_cell(difference)}, {gain / error:.1f} standard errors"
    return Comparison(difference, bool(pairs), Claim(text, figure, holds))


LONG = 1e9  # from here on a number is written with an exponent: nobody counts its digits


def format_cell(cell: Cell) -> str:
    """A cell as text; a Value gets the digits that its standard error supports, a bare number four significant ones."""
    if cell is None:
        return "–"
    if isinstance(cell, str):
        return cell
    if isinstance(cell, Value):
        if cell.error is None or cell.error == 0 or not math.isfinite(cell.error) or not math.isfinite(cell.mean):
            return _number(cell.mean)
        return _with_error(cell.mean, cell.error)
    return _number(cell)


def _with_error(mean: float, error: float) -> str:
    """The error to one significant digit, or two where that is a 1; the mean to the same decimal place."""
    digit, exponent = f"{error:.0e}".split("e")
    decimals = -int(exponent) + (1 if digit == "1" else 0)
    if decimals > 6 or max(abs(mean), error) >= LONG:
        return f"{mean:.2e} ± {error:.0e}"
    shown = max(0, decimals)
    return f"{round(mean, decimals):,.{shown}f} ± {round(error, decimals):,.{shown}f}"


def _number(number: float | int) -> str:
    if isinstance(number, int):
        return f"{number:,}"
    if not math.isfinite(number):
        return "∞" if number > 0 else "-∞" if number < 0 else "not a number"
    size = abs(number)
    if size >= 1000:
        return f"{number:,.0f}" if size < LONG else f"{number:.2e}"
    if size == 0 or size >= 1e-4:
        return f"{number:.4g}"
    return f"{number:.2e}"


def _minus(a: Value, b: Value) -> Value:
    known = a.error is not None and b.error is not None
    return Value(a.mean - b.mean, math.hypot(a.error or 0.0, b.error or 0.0) if known else None)


def _mean(arm: Arm) -> Value:
    return arm if isinstance(arm, Value) else mean_of(list(arm.values() if isinstance(arm, Mapping) else arm))


def _pairs(ours: Arm, theirs: Arm) -> list[tuple[float, float]]:
    """The figures of two arms seed by seed; empty when they cannot be paired."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return [(ours[seed], theirs[seed]) for seed in ours] if ours.keys() == theirs.keys() else []
    if isinstance(ours, (Mapping, Value)) or isinstance(theirs, (Mapping, Value)) or len(ours) != len(theirs):
        return []
    return list(zip(ours, theirs))
