"""The house: which room may import which, a method that stands alone, one meaning for a name, and what stays short."""

import ast
import re
from collections.abc import Iterator
from functools import cache
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
TEMPLATE = PACKAGE / "commands" / "template"  # files that `preceptor new` copies: no modules of the package
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if TEMPLATE not in path.parents]
METHODS = sorted(path.parent for path in (PACKAGE / "methods").glob("*/recipe.py"))
OFFERED = {
    "preceptor.dialogue.measures": "measures of any dialogue, of a person's as well: docs/dialogue.md",
    "preceptor.distillation.momentum": "a momentum copy as teacher, for any student: docs/vision.md",
    "preceptor.evaluation.frozen_features": "an examination of any features: docs/vision.md",
    "preceptor.losses.attention_relations": "a loss of the library: docs/losses.md",
    "preceptor.losses.chunked": "what the next two have in common",
    "preceptor.losses.dac_kl": "a loss of the library: docs/semantic-revision.md",
    "preceptor.losses.span_consistency": "a loss of the library: docs/semantic-revision.md",
    "preceptor.sandbox.child": "loaded by the sandbox's worker from its file, in a process without this package",
    "preceptor.sandbox.kernel": "loaded by the sandbox's worker from its file, in a process without this package",
    "preceptor.sandbox.worker": "the sandbox's process, started from its file",
    "preceptor.tasks.boxed": "verifiers of any task: docs/tasks.md",
    "preceptor.tasks.equality": "answers compared by value: docs/tasks.md",
    "preceptor.tasks.figures": "a task: docs/tasks.md",
    "preceptor.tasks.gsm8k": "a task: docs/tasks.md",
    "preceptor.tasks.programs": "a task: docs/tasks.md",
    "preceptor.vision.backbones": "networks for any vision method: docs/vision.md",
    "preceptor.vision.images": "images for any vision method: docs/vision.md",
    "preceptor.vision.views": "views for any vision method: docs/vision.md",
}
"""Modules of rooms that one method alone reaches, or none by an import, each with the reason why it is in a room."""


SHARED = {
    "preceptor.data.embedded_sentences",
    "preceptor.distillation.marked",
    "preceptor.distillation.on_policy",
    "preceptor.distillation.pair",
    "preceptor.evaluation.power_law",
    "preceptor.evaluation.power_law_picture",
    "preceptor.evaluation.probing",
    "preceptor.tasks.arithmetic",
    "preceptor.tasks.contamination",
    "preceptor.tasks.generated",
    "preceptor.tasks.records",
    "preceptor.tasks.sampling",
}
"""Modules that two methods share: where one of the two is deleted, they serve one, and stay."""


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in SOURCES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


def home(module: str, name: str) -> str:
    """The module that defines a name which ``from module import name`` takes, through the faces of packages."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    if MODULES[module].name == "__init__.py":
        for node in ast.walk(tree(MODULES[module])):
            if isinstance(node, ast.ImportFrom) and node.module in MODULES:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return home(str(node.module), alias.name)
    return module


@cache
def imported(module: str) -> frozenset[str]:
    """The package's modules that a module imports, anywhere in it, or names in a string to import them late."""
    found = set()
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module in MODULES:
                found |= {home(str(node.module), alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            found.add(str(node.value))
    return frozenset(found - {module})


def reached(start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for there in imported(waiting.pop()) - seen:
            seen.add(there)
            waiting.append(there)
    return seen


def definitions(kind: type | tuple[type, ...]) -> Iterator[tuple[str, ast.AST]]:
    for module, path in MODULES.items():
        yield from ((module, node) for node in ast.walk(tree(path)) if isinstance(node, kind))


def test_there_is_a_house_to_look_at() -> None:
    assert len(SOURCES) > 100
    assert len(METHODS) >= 1
    assert {"preceptor.cli", "preceptor.engine.run"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_lead_down(module: str) -> None:
    for there in imported(module):
        if room(module) == room(there) == "methods":
            assert module.split(".")[2:3] == there.split(".")[2:3], f"{module} imports {there}: another method"
        elif room(module) != room(there) and "__init__" not in (room(module), room(there)):
            assert FLOOR[room(module)] < FLOOR[room(there)], f"{module} imports {there}, which is not below it"


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} <= set(FLOOR)


def test_few_files_lie_on_the_top_level() -> None:
    assert 5 <= len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("folder", METHODS, ids=lambda path: path.name)
def test_a_method_is_a_recipe_and_its_reproduction(folder: Path) -> None:
    assert (folder / "reproduction.py").is_file()
    assert (folder / "__init__.py").read_text(encoding="utf-8").count("\n") <= 3
    assert (ROOT / "tests" / "methods" / folder.name).is_dir()


def test_every_folder_of_a_method_has_a_recipe() -> None:
    folders = {path.parent for path in (PACKAGE / "methods").glob("*/*.py")}
    assert folders == set(METHODS)


@pytest.mark.parametrize("folder", METHODS, ids=lambda path: path.name)
def test_a_recipe_is_short_and_has_its_loop_in_sight(folder: Path) -> None:
    recipe = folder / "recipe.py"
    assert len(recipe.read_text(encoding="utf-8").splitlines()) <= 300
    functions = {node.name: node for node in tree(recipe).body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() & {"main", "teach"} >= {"main"}
    loops = [function for function in functions.values() if any(map(is_update, ast.walk(function)))]
    assert loops, "no run.update(...) in the recipe"
    assert all(any(isinstance(node, ast.For | ast.While) for node in ast.walk(loop)) for loop in loops)


def is_update(node: ast.AST) -> bool:
    """Whether a node is a call of ``run.update``."""
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr == "update" and ast.unparse(called.value) == "run"


def test_a_room_is_no_satellite_of_one_method() -> None:
    """What one method alone reaches stands in its folder; the public face and each command are users as well."""
    users: dict[str, set[str]] = {module: set() for module in MODULES}
    for start in MODULES:
        user = ".".join(start.split(".")[1:3]) if room(start) in {"methods", "commands", "web"} else start
        if room(start) in {"methods", "commands", "web", "cli", "__main__"} or start == "preceptor":
            for there in reached(start):
                if not (user == "preceptor.cli" and room(there) == "commands"):
                    users[there].add(user)
    rooms = [name for name in MODULES if room(name) not in {"methods", "commands", "web", "__init__", "__main__"}]
    modules = [name for name in rooms if MODULES[name].name != "__init__.py"]
    lonely = {name for name in modules if not users[name] or (len(users[name]) == 1 and "methods" in str(users[name]))}
    assert lonely <= {*OFFERED, *SHARED}
    assert {*OFFERED, *SHARED} <= set(modules)
    assert {name for name in OFFERED if len(users[name]) > 1} == set(), "no longer an exception"
    assert {name for name in SHARED if len(users[name]) > 2} == set(), "no longer an exception"


def test_what_is_offered_is_documented() -> None:
    """Where an exception's reason names a page, the page names the module."""
    for module, reason in OFFERED.items():
        if "docs/" in reason:
            page = ROOT / reason.partition(": ")[2]
            assert module in page.read_text(encoding="utf-8"), f"{page.name} does not name {module}"


def test_a_class_name_is_defined_once() -> None:
    where: dict[str, list[str]] = {}
    for module, node in definitions(ast.ClassDef):
        where.setdefault(node.name, []).append(module)
    assert {name: places for name, places in where.items() if len(places) > 1 and name != "Config"} == {}


def test_functions_are_short() -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {f"{module}.{node.name}": node.end_lineno - node.lineno + 1 for module, node in definitions(kinds)}
    assert len(lengths) > 500
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_models_do_not_talk() -> None:
    """``told`` and ``said`` are for people: a model gives outputs, samples, targets, log-probabilities."""
    words = re.compile(r"(?<![a-z])(told|said)(?![a-z])", re.IGNORECASE)
    counts = {module: len(words.findall(path.read_text(encoding="utf-8"))) for module, path in MODULES.items()}
    assert sum(counts.values()) <= 40, {module: count for module, count in counts.items() if count}


def test_the_picture_of_the_house_shows_its_floors() -> None:
    picture = (ROOT / "docs" / "house.svg").read_text(encoding="utf-8")
    shown = re.findall(r'text-anchor="middle"[^>]*>([^<]+)<', picture)
    there = {room(module) for module in MODULES} - {"__init__", "__main__", "methods"}
    assert there <= set(shown)
    assert len(shown) == len(there) + 1, "the rooms, and one box for the methods"
    floors = [FLOOR.get(name, FLOOR["methods"]) for name in shown]
    assert floors == sorted(floors)
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    assert there <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
