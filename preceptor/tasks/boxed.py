r"""Answers in a box: what stands in the last ``\boxed{...}`` of a response, whether it is right, and files of MATH.

MATH (Hendrycks et al., 2021, arXiv 2103.03874) has a folder of JSON objects ``{"problem", "solution", "level",
"type"}``, whose solution ends with the answer in a box; MATH-500 and its like have lines with an ``answer`` of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.tasks.equality import canonical
from preceptor.tasks.records import Item

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<brace>\{)|\s*(?=[-+.\d])|\s+(?=\\))")


@dataclass(frozen=True)
class Judgement:
    """What a response answers (None: nothing), written so that equal answers are equal texts; whether it is right."""

    answer: str | None
    correct: bool


Verifier = Callable[[Item, str], Judgement]


"""Anything that reads a response to an item: run a program, compare a number, ask a judge."""


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` or ``\fbox{...}``; None where there is none, or it is never closed.

    Braces are matched. ``\boxed 5`` without them, as in some solutions of MATH, holds what comes before the dollar sign
    that ends its formula, or the next word where no dollar sign began one.
    """
    opened = None
    for opened in _BOX.finditer(text):  # noqa: B007  # the last one is meant
        pass
    if opened is None:
        return None
    if not opened["brace"]:
        rest = text[opened.end() :]
        in_formula = text[: opened.start()].count("$") % 2 and "$" in rest
        return (rest.split("$")[0] if in_formula else rest.split()[0]).strip().rstrip(".,;:")
    depth = 1
    for place in range(opened.end(), len(text)):
        before = text[place - 1]
        depth += (text[place] == "{" and before != "\\") - (text[place] == "}" and before != "\\")
        if depth == 0:
            return text[opened.end() : place].strip()
    return None


def by_value(item: Item, response: str) -> Judgement:
    """Right where the box holds the same number (1,000 is 1000, $18 is 18, 18.0 is 18), or else the same text.

    How both are read: ``tasks.equality``. An empty box is no answer.
    """
    inside = boxed(response)
    if not inside:
        return Judgement(None, False)
    return Judgement(canonical(inside, item.truth), canonical(inside, item.truth) == canonical(item.truth, item.truth))


def by_text(item: Item, response: str) -> Judgement:
    """Right where the box holds the true answer letter by letter, as the authors' scripts compare."""
    inside = boxed(response)
    return Judgement(inside or None, bool(inside) and inside == item.truth.strip())


def read_math(path: Path) -> tuple[Item, ...]:
    """The problems of a folder of JSON objects, or of a file of such lines. Skill and subskill are subject and level.

    Raises:
        UserError: nothing is there, a file is no UTF-8, or a problem lacks its text or its answer; it is named.
    """
    if path.is_dir():
        rows = [(str(file.relative_to(path)), read_utf8(file)) for file in sorted(path.rglob("*.json"))]
    else:
        lines = read_utf8(path).split("\n") if path.is_file() else []
        rows = [(f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"There is no problem in {path}: give a folder of MATH's JSON files, or a file of such lines.")
    return tuple(_item(path, where, text) for where, text in rows)


def read_utf8(path: Path) -> str:
    """A file's text.

    Raises:
        UserError: it is not in UTF-8.
    """
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not text in UTF-8 (byte {error.start} cannot be read): save it in this encoding."
        ) from error


def _item(path: Path, where: str, text: str) -> Item:
    row = _object(path, where, text)
    problem, solution = str(row.get("problem") or "").strip(), str(row.get("solution") or "")
    truth = str(row.get("answer") or boxed(solution) or "").strip()
    if not problem or not truth:
        lacks = "problem" if not problem else "answer (a box in its solution, or an answer of its own)"
        raise UserError(f"{where} of {path} has no {lacks}: mend or remove it.")
    skill, level = str(row.get("type") or row.get("subject") or "math"), str(row.get("level") or "unsorted")
    return Item(f"{path.stem}-{where}", "math", skill, level, problem, truth, work=solution)


def _object(path: Path, where: str, text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} of {path} is not JSON ({error}): mend or remove it.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} of {path} is no object with a problem and its solution: mend or remove it.")
    return row
