"""Tables of measured values: means with standard errors, comparisons of arms, and the claims that rest on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from preceptor.errors import UserError
from preceptor.statistics import Cell, Claim, Value, format_cell, mean_of


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
