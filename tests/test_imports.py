import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "preceptor"
SOURCES = sorted(PACKAGE.rglob("*.py"))
RECIPES = sorted((PACKAGE / "methods").glob("*/recipe.py"))
REPRODUCTIONS = sorted((PACKAGE / "methods").glob("*/reproduction.py"))
FORBIDDEN = {"utils", "helpers", "common", "misc", "base", "core", "manager", "_lib"}
LONGEST_FILE = 420
LONGEST_FUNCTION = 80
DEEPEST = 4


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; ``from a import b`` gives both ``a`` and ``a.b``."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_importing_preceptor_imports_no_torch() -> None:
    script = "import sys, preceptor; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names_load() -> None:
    import preceptor

    for name in preceptor.__all__:
        assert getattr(preceptor, name) is not None
    assert set(preceptor.__all__) <= set(dir(preceptor))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        preceptor.absent  # noqa: B018


def test_every_recipe_has_its_reproduction() -> None:
    assert [path.parent for path in REPRODUCTIONS] == [path.parent for path in RECIPES]
    for path in REPRODUCTIONS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "reproduce")
        assert [argument.arg for argument in found.args.args] == ["seeds", "folder", "full"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_a_method_can_be_deleted(recipe: Path, tmp_path: Path) -> None:
    name = recipe.parent.name
    shutil.copytree(PACKAGE, tmp_path / "preceptor", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "preceptor" / "methods" / name)
    script = f"from preceptor.cli import main; assert main(['list']) == 0; assert main(['run', '{name}']) == 2"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"preceptor run {name}" not in done.stdout


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_a_recipe_has_the_form(recipe: Path) -> None:
    from preceptor.catalogue import TAUGHT, read_method, read_settings

    method = read_method(recipe)
    assert method.requires in TAUGHT
    assert method.paper
    assert method.link
    assert method.text
    tree = ast.parse(recipe.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [argument.arg for argument in functions["main"].args.args] == ["config"]
    own = [setting for setting in read_settings(recipe) if "." not in setting.name]
    assert {"output", "resume", "training"} <= {setting.name for setting in own}
    assert len(own) <= 16, "at most 15 fields and the training"
    assert all(setting.help for setting in read_settings(recipe)), "every setting gives its unit or its symbol"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert path.stem not in FORBIDDEN
    assert len(text.splitlines()) <= LONGEST_FILE
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {
        node.name: node.end_lineno - node.lineno
        for node in functions
        if node.end_lineno - node.lineno > LONGEST_FUNCTION
    }
    assert not long
    assert depth(tree) <= DEEPEST


def depth(node: ast.AST, here: int = 0) -> int:
    """How deep loops, conditions and contexts lie in each other; an ``elif`` is no deeper than its ``if``."""
    below = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            below.append(depth(child, 0))
        elif isinstance(child, ast.For | ast.While | ast.If | ast.With | ast.Try):
            chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            below.append(depth(child, here + (0 if chained else 1)))
        else:
            below.append(depth(child, here))
    return max([here, *below])


def test_extras_are_in_the_package_data() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "torchvision" not in text
    assert "torchaudio" not in text
    for extra in ("text", "vision", "teachers", "report", "docs", "dev", "all"):
        assert f"\n{extra} = [" in text


def test_pickles_are_never_read_or_written() -> None:
    for path in SOURCES:
        names = set(imported(path))
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & names, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "torch.save"}:
                kept = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert kept.get("weights_only") == "True", path
