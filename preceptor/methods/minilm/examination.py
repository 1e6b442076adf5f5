"""The table of a run: the relations of held-out text before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preceptor.report.table import Table

if TYPE_CHECKING:
    from preceptor.methods.minilm.recipe import Config


def compare_relations(config: Config, before: dict[str, float], after: dict[str, float]) -> Table:
    """Held-out KL(teacher ‖ student) of each relation before and after, beside a student without any relation."""
    title = f"{config.student} taught by {config.assistant or config.teacher}"
    table = Table(title, ["uniform", "untaught", "taught", "fall"])
    for name in (name for name in after if not name.endswith(" uniform")):
        figures = {"uniform": after[f"{name} uniform"], "untaught": before[name], "taught": after[name]}
        table.rows[f"{name} relation"] = {**figures, "fall": f"{1 - after[name] / before[name]:.0%}"}
    table.units, table.better = dict.fromkeys(table.rows, "nat"), dict.fromkeys(table.rows, "lower")
    table.notes.append("KL(teacher ‖ student) a row, mean over heads, rows and held-out sequences.")
    return table
