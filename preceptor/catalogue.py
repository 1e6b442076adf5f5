"""The methods, read from their files without importing them.

There is no registry: a method is a folder with a ``recipe.py``. Those of this package lie in ``preceptor/methods`` and
have a name; any other, a folder or a single file, is found by its path. The recipe's docstring gives the title, the
paper and whether the reproduction holds; ``REQUIRES`` names the extra it needs; ``Config`` gives its settings.
"""

from __future__ import annotations

import ast
import difflib
import keyword
import os
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
    """What a recipe's file contains about itself.

    ``name`` is its folder's name, or its own where it stands alone; ``address`` is what the command takes: the name of
    a built-in method, the path of any other; ``title`` and ``summary`` are the two halves of the docstring's first
    line; ``paper`` and ``reproduction`` are its lines of that name; ``requires`` is the extra that brings its imports;
    ``command`` is one that runs it; ``text`` is the rest of the docstring, Markdown; ``path`` is the file.
    """

    name: str
    address: str
    title: str
    summary: str
    paper: str
    link: str
    reproduction: str
    requires: str
    command: str
    text: str
    path: Path

    @property
    def built_in(self) -> bool:
        """Whether it belongs to this package."""
        return self.address == self.name


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, as written in its source."""

    name: str
    type: str
    default: str
    help: str


def find_methods(folder: Path = RECIPES) -> list[Method]:
    """Every built-in method, by name."""
    return [read_method(path) for path in sorted(folder.glob("*/recipe.py"))]


def find_method(name: str, folder: Path = RECIPES) -> Method:
    """The built-in method called ``name`` (dashes count as underscores), or the one at the path ``name``.

    A path ends in ``.py`` or holds a separator: ``./mine``, ``mine/recipe.py``, ``mine.py``.

    Raises:
        UserError: there is none (the sentence names the nearest), or the file is no recipe.
    """
    if is_path(name):
        return read_method(_recipe_at(Path(name), folder))
    wanted = name.replace("-", "_").lower()
    names = [path.parent.name for path in sorted(folder.glob("*/recipe.py"))]
    if wanted in names:
        return read_method(folder / wanted / "recipe.py")
    for own in (Path(name, "recipe.py"), Path(f"{name}.py")):
        if own.is_file():
            raise UserError(f"There is no built-in recipe '{name}': did you mean '{address_of(own)}'?")
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    if near:
        raise UserError(f"There is no recipe '{name}': did you mean '{near[0]}'? ('preceptor list' shows all.)")
    raise UserError(f"There is no recipe '{name}': there are {', '.join(names) or 'none'}.")


def find_methods_at(path: Path) -> list[Method]:
    """The method at a path, or every method in the folder ``path`` (``*/recipe.py``).

    Raises:
        UserError: there is none, or a file is no recipe.
    """
    if path.is_dir() and not (path / "recipe.py").is_file() and (found := sorted(path.glob("*/recipe.py"))):
        return [read_method(_recipe_at(one)) for one in found]
    return [read_method(_recipe_at(path))]


def is_path(name: str) -> bool:
    """Whether a word of the command line is the path of a method, and not the name of a built-in one."""
    return name.endswith(".py") or name in {".", ".."} or "/" in name or "\\" in name


def address_of(path: Path) -> str:
    """What the command takes for the recipe ``path``: a built-in's name, or a path from here (absolute from above)."""
    path = path.resolve()
    place = path.parent if path.name == "recipe.py" else path
    if path.parent.parent == RECIPES.resolve():
        return place.name
    here = Path.cwd()
    return f"./{place.relative_to(here).as_posix()}" if here in place.parents else str(place)


def name_of(address: str) -> str:
    """The name of the method at an address: ``mine`` of ``./mine`` and of ``./mine.py``."""
    return Path(address).stem


def read_method(path: Path) -> Method:
    """Read one recipe's file.

    Raises:
        UserError: it is not Python, or has no docstring, no ``Config`` or no ``main``.
    """
    tree = _recipe_tree(path)
    docstring = ast.get_docstring(tree) or ""
    first = docstring.partition("\n")[0].strip()
    title, colon, summary = first.partition(": ")
    labelled, text = _sections(docstring)
    paper = labelled.get("Paper", "")
    link = re.search(r"https?://\S+", paper)
    address = path.parent.name if path.parent.parent == RECIPES else address_of(path)
    return Method(
        name=name_of(address),
        address=address,
        title=title if colon else name_of(address),
        summary=summary if colon else first,
        paper=paper.partition("http")[0].rstrip(" ,.;:<"),
        link=link[0].rstrip(".,;)>") if link else "",
        reproduction=labelled.get("Reproduction", "not stated"),
        requires=_constant(tree, "REQUIRES"),
        command=labelled.get("Command", f"`preceptor run {address}`").replace("``", "`"),
        text=text,
        path=path,
    )


def _recipe_at(path: Path, built_in: Path = RECIPES) -> Path:
    """The recipe's file that a path leads to, with a name that Python can import."""
    file = path / "recipe.py" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise UserError(f"{path} holds no recipe.py: 'preceptor new NAME' writes a folder that does.")
        raise UserError(f"There is no file {path}: give a recipe's file, or a folder with recipe.py.")
    if file.suffix != ".py":
        raise UserError(f"{path} is not a Python file: give a recipe's file, or a folder with recipe.py.")
    file = file.resolve()
    name = file.parent.name if file.name == "recipe.py" else file.stem
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"'{name}' ({path}) is not a name that Python can import: use letters, digits, underscores.")
    if file.parent.parent != built_in.resolve() and (built_in / name / "recipe.py").is_file():
        raise UserError(f"{path} has the name of the built-in method '{name}': rename it.")
    return file


def _recipe_tree(path: Path) -> ast.Module:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno} is not Python ({error.msg}): correct it.") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is not Python ({error}): give a recipe's file.") from None
    if not ast.get_docstring(tree):
        raise UserError(f'{path} has no docstring: begin it with """Title: what is taught, and how."""')
    names = {name for node in tree.body for name in _bound(node)}
    for needed, what in (("Config", "a frozen dataclass of settings"), ("main", "a function main(config)")):
        if needed not in names:
            raise UserError(f"{path} has no {needed}: a recipe holds {what} ('preceptor new NAME' writes an example).")
    return tree


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement at the top of a file binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def read_settings(path: Path, class_name: str = "Config") -> list[Setting]:
    """The fields of the dataclass ``class_name`` in the file ``path``, with their docstrings.

    A field whose type is another dataclass, of the same file, of this package or of the recipe's own folder, is
    followed by that one's fields: ``objective.beta``.
    """
    return _fields(path, class_name, "", {})


def read_presets(path: Path) -> dict[str, str]:
    """The source of the settings that the file assigns to ``tiny`` and ``paper``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    named = {node.targets[0].id: node.value for node in assigned if isinstance(node.targets[0], ast.Name)}
    return {name: ast.unparse(named[name]) for name in ("tiny", "paper") if name in named}


def markdown_table(methods: list[Method], link: str = "preceptor/methods/{name}/recipe.py") -> str:
    """The table of methods for the README and the documentation; ``link`` is where a built-in method's name leads."""
    lines = ["| method | what is taught, and how | paper | needs | reproduction |", "| --- | --- | --- | --- | --- |"]
    for method in methods:
        target = link.format(name=method.name) if method.built_in else os.path.relpath(method.path)
        name = f"[`{method.name}`]({target})"
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
    """The command that repeats a run of the method with the address ``method`` in another folder."""
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
            home = _file_of(node, path)
            return _fields(home, class_name, prefix, given) if home else []
    return []


def _fields_of(body: list[ast.stmt], path: Path, prefix: str, given: Given, tree: ast.Module) -> list[Setting]:
    found: list[Setting] = []
    place = 0
    for node, after in zip(body, [*body[1:], ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = ast.unparse(node.annotation)
            help_text = " ".join(_string(after).split())
            value = given.get(node.target.id) or given.get(place) or (node.value and _meant(node.value, tree, path))
            found.append(Setting(prefix + node.target.id, kind, ast.unparse(value) if value else "", help_text))
            found += _fields(path, kind, f"{prefix}{node.target.id}.", _given(value, tree, path))
            place += 1
    return found


def _given(value: ast.expr | None, tree: ast.Module, path: Path) -> Given:
    """The arguments of a call, or of ``replace`` on top of one."""
    if not isinstance(value, ast.Call):
        return {}
    named: Given = {one.arg: _meant(one.value, tree, path) for one in value.keywords if one.arg}
    placed: Given = dict(enumerate(_meant(argument, tree, path) for argument in value.args))
    if isinstance(value.func, ast.Name) and value.func.id == "replace" and placed:
        return {**_given(placed[0], tree, path), **named}
    return {**placed, **named}


def _meant(value: ast.expr, tree: ast.Module, path: Path) -> ast.expr:
    """What makes a default: of ``field`` its default, of a name its value here or where it is imported from."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        given = {one.arg: one.value for one in value.keywords}
        made = given.get("default", given.get("default_factory", value))
        return made.body if isinstance(made, ast.Lambda) else made
    if not isinstance(value, ast.Name):
        return value
    for node in tree.body:
        if isinstance(node, ast.Assign) and _named(node, value.id):
            return node.value
        if isinstance(node, ast.ImportFrom) and value.id in {alias.name for alias in node.names}:
            home = _file_of(node, path)
            return _meant(value, ast.parse(home.read_text(encoding="utf-8")), home) if home else value
    return value


def _named(node: ast.Assign, name: str) -> bool:
    return [target.id for target in node.targets if isinstance(target, ast.Name)] == [name]


def _file_of(node: ast.ImportFrom, path: Path) -> Path | None:
    """The file that an import in ``path`` leads to: of this package, or beside ``path``."""
    parts = node.module.split(".") if node.module else []
    if node.level:
        starts = [path.parents[node.level - 1]]
    elif parts[0] == "preceptor":
        starts, parts = [Path(__file__).parent], parts[1:]
    else:
        starts = [path.parent, path.parent.parent]
    places = [start.joinpath(*parts) for start in starts]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
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
