"""English sentences that every Python installation carries: its language reference and its library's docstrings.

They are the text that encoders learn from when no file is given, so that everything runs without a network. Which
sentences there are depends on the Python version and on how it was installed; their order does not depend on the
machine.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from preceptor.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__", "turtledemo"}


_MARKUP = re.compile(r":[\w:]+:`~?([^`]*)`|[`*|]+")


_END = re.compile(r"(?<=[a-z\d)\"'][.!?])\s+(?=[A-Z])")


_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*$")


class Sentence(NamedTuple):
    """A sentence and where it stands: ``"reference"`` or the name of a module or package of the standard library."""

    text: str
    source: str


def embedded_sentences(*, shortest: int = 6, longest: int = 50) -> list[Sentence]:
    """All distinct sentences of ``shortest`` to ``longest`` words, mostly plain words, in a fixed order.

    Raises:
        UserError: this Python carries neither its reference nor its library's source.
    """
    kept: dict[str, Sentence] = {}
    for paragraph, source in _paragraphs():
        for text in _END.split(paragraph):
            if shortest <= len(text.split()) <= longest and _is_prose(text):
                kept.setdefault(text.casefold(), Sentence(text, source))
    if not kept:
        raise UserError(
            "This Python carries no English text (no library source): give a file of sentences with --data."
        )
    return list(kept.values())


@cache
def _paragraphs() -> tuple[tuple[str, str], ...]:
    return tuple((text, source) for document, source in _documents() for text in _prose(document))


def _documents() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for topic in _topics(root / "pydoc_data" / "topics.py").values():
        yield topic, "reference"
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _SKIPPED.isdisjoint(parts) and parts[0] != "pydoc_data":
            for text in _docstrings(path):
                yield text, parts[0].removesuffix(".py")


def _topics(path: Path) -> dict[str, str]:
    """The dictionary that the file assigns to ``topics``, read without running it."""
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return dict(sorted(ast.literal_eval(node.value).items()))
    return {}


def _docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(_parse(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _parse(path: Path) -> ast.Module:
    """The file's syntax tree; an empty one when it is absent or cannot be parsed, as some templates cannot."""
    try:
        return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def _prose(document: str) -> Iterator[str]:
    """Paragraphs on one line each, without markup; code examples, tables and lists of signatures stay out."""
    for block in re.split(r"\n\s*\n", document):
        lines = [line.strip() for line in block.splitlines()]
        if any(line.startswith((">>>", "...", "+-", "==", "--", "#")) or "::=" in line for line in lines):
            continue
        yield re.sub(r"\s+", " ", _MARKUP.sub(r"\1", " ".join(lines))).strip()


def _is_prose(text: str) -> bool:
    words = text.split()
    plain = sum(bool(_WORD.match(word.strip(".,;:!?()\"'"))) for word in words)
    return text[0].isupper() and text[-1] in ".!?" and plain >= 0.85 * len(words)
