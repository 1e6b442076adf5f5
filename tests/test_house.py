"""The house: which room may import which, and that a method stands alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "preceptor"
FLOORS = (  # from the top down: a room imports rooms of lower floors only; rooms of one floor do not know each other
    ("__init__", "__main__"),
    ("cli",),
    ("commands", "web"),
    ("methods",),
    ("evaluation", "dialogue", "people", "cache"),
    ("distillation", "language", "vision", "speech"),
    ("engine", "losses", "models", "report", "tasks"),
    ("data", "sandbox", "statistics", "knowledge", "files", "catalogue", "extras"),
    ("errors",),
)
FLOOR = {room: place for place, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("preceptor."):
                yield tuple(name.split(".")[1:])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: ".".join(place(path)))
def test_imports_lead_down(path: Path) -> None:
    here = place(path)
    for there in imported(path):
        if here[0] == there[0] == "methods":
            assert here[1] == there[1], f"the method {here[1]} imports {there[1]}"
        elif here[0] != there[0]:
            assert FLOOR[here[0]] < FLOOR[there[0]], f"{here[0]} imports {there[0]}, which is not below it"


def test_every_room_has_a_floor() -> None:
    assert {place(path)[0] for path in SOURCES} <= set(FLOOR)


@pytest.mark.parametrize("folder", sorted((PACKAGE / "methods").glob("[a-z]*/")), ids=lambda path: path.name)
def test_a_method_is_a_recipe_and_its_reproduction(folder: Path) -> None:
    assert (folder / "recipe.py").is_file()
    assert (folder / "reproduction.py").is_file()
    assert (folder / "__init__.py").read_text(encoding="utf-8").count("\n") <= 3


def test_a_room_is_no_satellite() -> None:
    """What exactly one method reaches stands in its folder; of a library room the public face is the second user."""
    library = {
        "losses",
        "models",
        "tasks",
        "sandbox",
        "cache",
        "language",
        "vision",
        "data",
        "engine",
        "speech",
        "people",
    }
    graph = {place(path): set(imported(path)) for path in SOURCES}
    users: dict[tuple[str, ...], set[str]] = {}
    for start in graph:
        if start[0] in ("methods", "commands", "web"):
            seen, todo = set(), [start]
            while todo:
                for there in graph.get(todo.pop(), ()):
                    if there not in seen:
                        seen.add(there)
                        todo.append(there)
            for there in seen:
                users.setdefault(there, set()).add(f"{start[0]}.{start[1] if len(start) > 1 else ''}")
    lonely = {
        ".".join(there)
        for there, who in users.items()
        if len(who) == 1 and there in graph and there[0] not in (*library, "methods", "commands", "web")
    }
    assert lonely <= {"dialogue.measures", "distillation.momentum", "evaluation.frozen_features"}, lonely
