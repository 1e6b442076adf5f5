"""Tables of measured values: means with standard errors, comparisons of arms, and the claims that rest on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from preceptor.errors import UserError


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


@dataclass
class Table:
    """Named rows by named columns.

    ``rows``: row label -> column -> cell; a missing cell is shown as a dash. ``units`` and ``better`` belong to the
    label of a row or of a column (where the measures are).
    """

    title: str
    columns: list[str]
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    better: dict[str, Literal["lower", "higher"]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every claim holds (true without claims)."""
        return all(claim.holds for claim in self.claims)

    def label(self, name: str) -> str:
        """A row's or a column's name with its unit and the direction that is better: ``perplexity ↓``."""
        unit = f" ({self.units[name]})" if self.units.get(name) else ""
        arrow = {"lower": " ↓", "higher": " ↑"}.get(self.better.get(name, ""), "")
        return name + unit + arrow

    def markdown(self) -> str:
        """The table as Markdown, with its notes and claims under it."""
        head = ["", *(self.label(column) for column in self.columns)]
        lines = [_markdown_row(head), "|" + "|".join([" --- ", *(" ---: " for _ in self.columns)]) + "|"]
        for name, cells in self.rows.items():
            lines.append(_markdown_row([self.label(name), *(format_cell(cells.get(c)) for c in self.columns)]))
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        if self.claims:
            lines += ["", *(f"- **{_verdict(claim)}**: {claim.text} ({claim.figure})" for claim in self.claims)]
        return "\n".join([f"### {self.title}", "", *lines]) + "\n"

    def json(self) -> dict[str, Any]:
        """The table as a dictionary that ``json.dumps`` writes as strict JSON (infinities as strings)."""
        return {
            "title": self.title,
            "columns": list(self.columns),
            "rows": {n: {c: _plain(cell) for c, cell in cells.items()} for n, cells in self.rows.items()},
            "units": dict(self.units),
            "better": dict(self.better),
            "notes": list(self.notes),
            "claims": [{"text": c.text, "figure": c.figure, "holds": c.holds} for c in self.claims],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        """Read what :meth:`json` wrote.

        Raises:
            UserError: the dictionary is not such a table.
        """
        try:
            rows = {n: {c: _cell(cell) for c, cell in cells.items()} for n, cells in data["rows"].items()}
            claims = [Claim(str(c["text"]), str(c["figure"]), bool(c["holds"])) for c in data.get("claims", [])]
            return cls(
                title=str(data["title"]),
                columns=[str(column) for column in data["columns"]],
                rows=rows,
                units=dict(data.get("units", {})),
                better=dict(data.get("better", {})),
                notes=[str(note) for note in data.get("notes", [])],
                claims=claims,
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"The table is not one that Preceptor wrote ({error!r}); write it again with `preceptor evaluate`."
            ) from error

    def print(self, console: Console | None = None) -> None:
        """Print the table, its notes and its claims on the terminal."""
        console = console or Console()
        table = RichTable(title=escape(self.title), title_justify="left", header_style="bold")
        table.add_column("")
        for column in self.columns:
            table.add_column(escape(self.label(column)), justify="right")
        for name, cells in self.rows.items():
            table.add_row(escape(self.label(name)), *(escape(format_cell(cells.get(c))) for c in self.columns))
        console.print(table)
        for note in self.notes:
            console.print(f"[dim]{escape(note)}[/dim]")
        for claim in self.claims:
            colour = "green" if claim.holds else "red"
            console.print(f"[{colour}]{_verdict(claim)}[/{colour}]: {escape(claim.text)} ({escape(claim.figure)})")


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


def aggregate(tables: Sequence[Table], title: str | None = None) -> Table:
    """One table over several seeds: each number becomes the mean over the tables ± its standard error over them.

    Text cells stay when all tables agree. Claims of the single tables are dropped: they are about one seed.

    Raises:
        UserError: no table, or tables with different rows or columns.
    """
    if not tables:
        raise UserError("There is no table to aggregate; run at least one seed.")
    first = tables[0]
    for table in tables[1:]:
        if table.columns != first.columns or list(table.rows) != list(first.rows):
            raise UserError(
                f"The tables '{first.title}' and '{table.title}' differ in rows or columns; run the same arms."
            )
    rows: dict[str, dict[str, Cell]] = {}
    for name in first.rows:
        rows[name] = {column: _over([t.rows[name].get(column) for t in tables]) for column in first.columns}
    notes = [*first.notes, f"Mean ± standard error over {len(tables)} seeds."]
    return Table(title or first.title, list(first.columns), rows, dict(first.units), dict(first.better), notes)


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
    if decimals > 6:
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
        return f"{number:,.0f}"
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


def _over(cells: Sequence[Cell]) -> Cell:
    numbers = [cell.mean if isinstance(cell, Value) else cell for cell in cells]
    if all(isinstance(number, (int, float)) for number in numbers):
        return mean_of([float(number) for number in numbers if isinstance(number, (int, float))])
    return cells[0] if all(cell == cells[0] for cell in cells) else None


def _verdict(claim: Claim) -> str:
    return "holds" if claim.holds else "does not hold"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _plain(cell: Cell) -> Any:
    if isinstance(cell, Value):
        return {"mean": _finite(cell.mean), "error": _finite(cell.error), "count": cell.count}
    if isinstance(cell, float) and not math.isfinite(cell):
        return {"mean": str(cell), "error": None, "count": None}
    return cell


def _finite(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)


def _cell(data: Any) -> Cell:
    if not isinstance(data, Mapping):
        if data is None or isinstance(data, (str, int, float)):
            return data
        raise TypeError(f"a cell holds {type(data).__name__}")
    error, count = data.get("error"), data.get("count")
    return Value(float(data["mean"]), None if error is None else float(error), None if count is None else int(count))
