"""The published methods that this package holds, read from their files without importing them.

There is no registry: a method is a folder in ``preceptor/methods`` with a ``recipe.py``. The recipe's docstring gives
the name, the paper and whether the reproduction holds; ``REQUIRES`` names the extra it needs; ``Config`` gives its
settings.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import UserError

RECIPES = Path(__file__).parent / "methods"


LABEL = re.compile(r"(Paper|Reproduction|Command): *")


TAUGHT = {
    "text": "Language models",
    "vision": "Vision models",
    "speech": "Speech models",
    "teachers": "Teachers that write data",
    "people": "People",
    "web": "The classroom",
}


@dataclass(frozen=True)
class Method:
    """What a recipe's file says about itself.

    ``name`` is the file's name and the command's; ``title`` and ``summary`` are the two halves of the docstring's first
    line; ``paper`` and ``reproduction`` are its lines of that name; ``requires`` is the extra that brings its imports;
    ``command`` is one that runs it; ``text`` is the rest of the docstring, Markdown.
    """

    name: str
    title: str
    summary: str
    paper: str
    link: str
    reproduction: str
    requires: str
    command: str
    text: str
    path: Path


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as its source says it."""

    name: str
    type: str
    default: str
    help: str


def find_methods(folder: Path = RECIPES) -> list[Method]:
    """Every recipe in ``folder``, by name; files that begin with an underscore are none."""
    return [read_method(path) for path in sorted(folder.glob("*/recipe.py"))]


def find_method(name: str, folder: Path = RECIPES) -> Method:
    """The recipe called ``name`` (dashes count as underscores).

    Raises:
        UserError: there is none; the sentence names the nearest.
    """
    wanted = name.replace("-", "_").lower()
    names = [path.parent.name for path in sorted(folder.glob("*/recipe.py"))]
    if wanted in names:
        return read_method(folder / wanted / "recipe.py")
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    if near:
        raise UserError(f"There is no recipe '{name}': did you mean '{near[0]}'? ('preceptor list' shows all.)")
    raise UserError(f"There is no recipe '{name}': there are {', '.join(names) or 'none'}.")


def read_method(path: Path) -> Method:
    """Read one recipe's file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    first = docstring.partition("\n")[0].strip()
    title, colon, summary = first.partition(": ")
    labelled, text = _sections(docstring)
    paper = labelled.get("Paper", "")
    link = re.search(r"https?://\S+", paper)
    return Method(
        name=path.parent.name,
        title=title if colon else path.parent.name,
        summary=summary if colon else first,
        paper=paper.partition("http")[0].rstrip(" ,.;:<"),
        link=link[0].rstrip(".,;)>") if link else "",
        reproduction=labelled.get("Reproduction", "not stated"),
        requires=_constant(tree, "REQUIRES"),
        command=labelled.get("Command", f"`preceptor run {path.parent.name}`").replace("``", "`"),
        text=text,
        path=path,
    )


def read_settings(path: Path, class_name: str = "Config") -> list[Setting]:
    """The fields of the dataclass ``class_name`` in the file ``path``, with their docstrings.

    A field whose type is another dataclass, of the same file or of this package, is followed by that one's fields:
    ``objective.beta``.
    """
    return _fields(path, class_name, "", {})


def read_presets(path: Path) -> dict[str, str]:
    """The source of the settings that the file assigns to ``tiny`` and ``paper``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    named = {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}
    return {name: ast.unparse(named[name]) for name in ("tiny", "paper") if name in named}


def markdown_table(methods: list[Method], link: str = "preceptor/methods/{name}/recipe.py") -> str:
    """The table of methods for the README and the documentation; ``link`` says where a method's name leads."""
    lines = ["| method | what is taught, and how | paper | needs | reproduction |", "| --- | --- | --- | --- | --- |"]
    for method in methods:
        name = f"[`{method.name}`]({link.format(name=method.name)})"
        paper = f"[{method.paper}]({method.link})" if method.link else method.paper
        lines.append(f"| {name} | {method.summary} | {paper} | `{method.requires}` | {method.reproduction} |")
    return "\n".join(lines) + "\n"


def _sections(docstring: str) -> tuple[dict[str, str], str]:
    """The labelled paragraphs (``Paper: ...``, up to an empty line or the next label), and the text without them."""
    labelled: dict[str, list[str]] = {}
    text: list[str] = []
    inside = ""
    for line in docstring.splitlines()[1:]:
        begins = LABEL.match(line)
        inside = begins[1] if begins else inside if line.strip() else ""
        if inside:
            labelled.setdefault(inside, []).extend(line[begins.end() if begins else 0 :].split())
        else:
            text.append(line)
    return {label: " ".join(words) for label, words in labelled.items()}, "\n".join(text).strip()


def repeat(method: str, folder: Path) -> str:
    """The command that does a run again, elsewhere."""
    return f"preceptor run {method} --config {folder / 'config.json'} --output NEW_FOLDER"


Given = Mapping[str | int, ast.expr]


"""What an instance is made with: its arguments by name, and by place where they have none."""


def _fields(path: Path, class_name: str, prefix: str, given: Given) -> list[Setting]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            return _fields_of(node.body, path, prefix, given, tree) if is_dataclass else []
        if isinstance(node, ast.ImportFrom) and class_name in {alias.name for alias in node.names}:
            home = _file_of(node.module or "")
            return _fields(home, class_name, prefix, given) if home else []
    return []


def _fields_of(body: list[ast.stmt], path: Path, prefix: str, given: Given, tree: ast.Module) -> list[Setting]:
    found: list[Setting] = []
    place = 0
    for node, after in zip(body, [*body[1:], ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation)
            help_text = " ".join(_string(after).split())
            value = given.get(node.target.id) or given.get(place) or (node.value and _meant(node.value, tree))
            found.append(Setting(prefix + node.target.id, kind, ast.unparse(value) if value else "", help_text))
            found += _fields(path, kind, f"{prefix}{node.target.id}.", _given(value, tree))
            place += 1
    return found


def _given(value: ast.expr | None, tree: ast.Module) -> Given:
    """The arguments of a call, or of ``replace`` on top of one."""
    if not isinstance(value, ast.Call):
        return {}
    named: Given = {keyword.arg: _meant(keyword.value, tree) for keyword in value.keywords if keyword.arg}
    placed: Given = dict(enumerate(_meant(argument, tree) for argument in value.args))
    if isinstance(value.func, ast.Name) and value.func.id == "replace" and placed:
        return {**_given(placed[0], tree), **named}
    return {**placed, **named}


def _meant(value: ast.expr, tree: ast.Module) -> ast.expr:
    """What makes a default: of ``field`` its default, of a name what it stands for here or where it comes from."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        made = given.get("default", given.get("default_factory", value))
        return made.body if isinstance(made, ast.Lambda) else made
    if not isinstance(value, ast.Name):
        return value
    for node in tree.body:
        if isinstance(node, ast.Assign) and _named(node, value.id):
            return node.value
        if isinstance(node, ast.ImportFrom) and value.id in {alias.name for alias in node.names}:
            home = _file_of(node.module or "")
            return _meant(value, ast.parse(home.read_text(encoding="utf-8"))) if home else value
    return value


def _named(node: ast.Assign, name: str) -> bool:
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == [name]


def _file_of(module: str) -> Path | None:
    """The file of one of this package's modules."""
    package, *parts = module.split(".")
    path = Path(__file__).parent.joinpath(*parts)
    files = [path.with_suffix(".py"), path / "__init__.py"] if package == "preceptor" else []
    return next((file for file in files if file.is_file()), None)


def _constant(tree: ast.Module, name: str) -> str:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == name:
            return str(ast.literal_eval(node.value))
    return ""


def _string(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return ""
