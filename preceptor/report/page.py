"""The page of a run as HTML: everything that it shows is escaped, and it makes no outside request."""

from __future__ import annotations

import re
from base64 import b64encode
from calendar import month_name
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from typing import Any

from preceptor.catalogue import find_method, name_of, repeat
from preceptor.errors import UserError
from preceptor.report.contents import Contents
from preceptor.report.curves import Curve, collect, draw
from preceptor.report.table import Table
from preceptor.statistics import Cell, Value, format_cell

NO_REQUESTS = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


TAUGHT = "taught student"


def render(contents: Contents) -> str:
    """The whole page as HTML."""
    name = _name(contents)
    sections = [
        _header(contents, name),
        _table_section(contents.table),
        _claims(contents.table),
        _pictures(contents),
        _curves(contents),
        _samples(contents),
        _repeat(contents),
        _pairs("Settings", contents.config),
        _pairs("Environment", contents.environment),
    ]
    style = files("preceptor.report").joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{NO_REQUESTS}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n<footer>Written by Preceptor.</footer>\n</body>\n</html>\n"
    )


def headline(contents: Contents) -> str:
    """The main figure in one sentence: the run's own headline, else one from claims, table or metrics."""
    if contents.headline:
        return contents.headline
    table = contents.table
    if table is not None and table.claims:
        held, claims = sum(claim.holds for claim in table.claims), len(table.claims)
        if claims == 1:
            return f"The claim {'holds' if held else 'does not hold'}."
        every = "Both" if claims == 2 else f"All {claims}"
        return f"{every} claims hold." if held == claims else f"{held} of {claims} claims hold."
    if table is not None:
        return table.title + "."
    if not contents.metrics:
        return "The run has not taken a step yet."
    asked = f" of {contents.total:,}" if contents.total else ""
    losses = [line["loss"] for line in contents.metrics if "loss" in line]
    course = f" The loss went from {losses[0]:.3g} to {losses[-1]:.3g}." if losses else ""
    if contents.total and contents.steps >= contents.total:
        return f"Trained for {contents.steps:,} steps, not evaluated yet.{course}"
    return f"This run is not finished: {contents.steps:,}{asked} steps are done.{course}"


def _name(contents: Contents) -> str:
    folder, method = contents.folder.resolve().name, name_of(contents.method)
    if contents.reproduction:
        return f"Reproduction of {method}" if method else f"Reproduction: {folder}"
    return f"{method} · {folder}" if method else folder


def _header(contents: Contents, name: str) -> str:
    facts = {label: value for label, value in _facts(contents) if value}
    listed = "".join(
        f"<div{_wide(label)}><dt>{escape(label)}</dt><dd>{value}</dd></div>" for label, value in facts.items()
    )
    badge = "" if contents.finished else '<span class="badge">not finished</span>'
    return (
        f'<header>\n<h1>{escape(name)} {badge}</h1>\n<p class="headline">{escape(headline(contents))}</p>\n'
        f'<dl class="facts">{listed}</dl>\n</header>'
    )


def _wide(label: str) -> str:
    return ' class="wide"' if label == "Method" else ""


def _facts(contents: Contents) -> Iterator[tuple[str, str]]:
    """Labels and HTML: what was taught to whom, with which method, when, and in how long."""
    for label in ("teacher", "student"):
        value = contents.config.get(label)
        yield label.capitalize(), f"<code>{escape(value)}</code>" if isinstance(value, str) else ""
    asked = f" of {contents.total:,}" if contents.total and contents.total != contents.steps else ""
    yield "Steps", f"{contents.steps:,}{asked}" if contents.metrics else ""
    yield "Training", _duration(contents.seconds) if contents.seconds else ""
    when = contents.written
    yield "When", f"{when.day} {month_name[when.month]} {when.year}, {when:%H:%M} UTC"
    device, threads = contents.environment.get("device"), contents.environment.get("threads")
    yield "Device", escape(f"{device}, {threads} thread{'' if threads == 1 else 's'}") if device else ""
    yield "Method", _method(contents.method)


def _method(address: str) -> str:
    try:
        method = find_method(address)
    except UserError:
        return escape(name_of(address))
    paper = escape(method.paper or method.link)
    linked = f'<a href="{escape(method.link)}">{paper}</a>' if method.link.startswith("https://") else paper
    about = f"{escape(method.title)}: {escape(method.summary)}"
    return f"{about}<br><small>{linked}</small>" if linked else about


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _table_section(table: Table | None) -> str:
    if table is None:
        return ""
    head = "".join(f'<th scope="col"{_taught(c)}>{_label(table, c)}</th>' for c in table.columns)
    rows = "".join(_row(table, name) for name in table.rows)
    cells = [cell for row in table.rows.values() for cell in row.values()]
    kind = "" if any(isinstance(cell, Value) and cell.error for cell in cells) else ' class="exact"'
    legend = ["↓ lower is better, ↑ higher is better."] if table.better else []
    notes = "".join(f"<p>{escape(note)}</p>" for note in [*table.notes, *legend])
    return (
        f'<section>\n<h2>What was learned</h2>\n<div class="scroll" tabindex="0" role="region" aria-label="Table">'
        f"<table{kind}><caption>{escape(table.title)}</caption><thead><tr><td></td>{head}</tr></thead>"
        f'<tbody>{rows}</tbody></table></div>\n<div class="notes">{notes}</div>\n</section>'
    )


def _row(table: Table, name: str) -> str:
    cells = "".join(
        f'<td data-label="{escape(table.label(column))}"{_taught(column)}>{_cell(table.rows[name].get(column))}</td>'
        for column in table.columns
    )
    return f'<tr><th scope="row">{_label(table, name)}</th>{cells}</tr>\n'


def _taught(column: str) -> str:
    return ' class="taught"' if column == TAUGHT else ""


def _label(table: Table, name: str) -> str:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(table.better.get(name, ""), "")
    unit = f'<span class="unit">{escape(table.units[name])}</span>' if table.units.get(name) else ""
    return f"{escape(name)}{arrow} {unit}".strip()


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f"<span>{escape(cell)}</span>"
    mean, sign, error = _minus(format_cell(cell)).partition(" ± ")
    return f'<span class="value">{escape(mean)}<span class="error">{escape(sign + error)}</span></span>'


def _minus(text: str) -> str:
    """Numbers with a true minus sign."""
    return re.sub(r"(?<![\w.])-(?=[\d∞])", "−", text)


def _claims(table: Table | None) -> str:
    if table is None or not table.claims:
        return ""
    listed = "".join(
        f'<li class="{kind}"><strong>{verdict}</strong> {escape(claim.text)} '
        f"<span>{escape(_minus(claim.figure))}</span></li>"
        for claim in table.claims
        for kind, verdict in [("holds", "Holds") if claim.holds else ("fails", "Does not hold")]
    )
    return f'<section>\n<h2>Claims</h2>\n<ul class="claims">{listed}</ul>\n</section>'


def _curves(contents: Contents) -> str:
    curves = collect(contents.metrics)
    if not curves:
        return ""
    try:
        drawn = [(curve, draw(curve)) for curve in curves]
    except ModuleNotFoundError:
        missing = 'The curves need matplotlib: <code>pip install "preceptor[report]"</code>, then write the page again.'
        return f"<section>\n<h2>Curves</h2>\n<p>{missing}</p>\n</section>"
    figures = "\n".join(
        f"<figure><figcaption>{escape(c.title)}{_key(c)}</figcaption>{svg}</figure>" for c, svg in drawn
    )
    return f'<section>\n<h2>Curves</h2>\n<div class="curves">{figures}</div>\n</section>'


def _key(curve: Curve) -> str:
    both = curve.training.steps and curve.held_out.steps
    return '<span class="key"><i class="first"></i>training <i class="second"></i>held out</span>' if both else ""


def _samples(contents: Contents) -> str:
    if not contents.samples:
        return ""
    shown = []
    for sample in contents.samples:
        answers = "".join(
            f"<div{_taught(label)}><h3>{escape(label)}</h3><p>{escape(text) or '<em>no answer</em>'}</p></div>"
            for label, text in sample.answers.items()
        )
        shown.append(
            f'<article><blockquote>{escape(sample.prompt)}</blockquote><div class="answers">{answers}</div></article>'
        )
    return "<section>\n<h2>Samples</h2>\n" + "\n".join(shown) + "\n</section>"


def _pictures(contents: Contents) -> str:
    figures = "\n".join(
        f'<figure><img src="data:image/png;base64,{b64encode(picture.png).decode()}" alt="{escape(picture.caption)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in contents.pictures
    )
    return f'<section>\n<h2>Pictures</h2>\n<div class="pictures">{figures}</div>\n</section>' if figures else ""


def _repeat(contents: Contents) -> str:
    commands = [contents.command] if contents.command else []
    if contents.method and contents.reproduction:
        commands.append(f"preceptor reproduce {contents.method}")
    elif contents.method and contents.config:
        commands.append(repeat(contents.method, contents.folder))
        if not contents.finished:
            commands.append(f"preceptor run {contents.method} --config {contents.folder}/config.json --resume")
    if not commands:
        return ""
    listed = "\n".join(dict.fromkeys(commands))
    return f"<section>\n<h2>Commands to repeat it</h2>\n<pre>{escape(listed)}</pre>\n</section>"


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in _flat(values))
    return f'<section>\n<h2>{escape(title)}</h2>\n<dl class="pairs">{rows}</dl>\n</section>' if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted names; what is not set is left out."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != "" and value != []:
            yield prefix + name, _setting(value)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
