"""A method outside the package, a file or a folder, goes through every command as a built-in does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from preceptor import cli
from preceptor.catalogue import find_method, read_settings
from preceptor.report import write_report

RECIPE = '''"""Mine: a line through two points.

Paper: On Lines (Euclid, 2026), https://example.org/lines

    L = (a x - y)²
"""

from dataclasses import dataclass, field

from preceptor.engine.run import Run
from preceptor.engine.settings import Training

PIECES
REQUIRES = "text"


@dataclass(frozen=True)
class Config:
    """Settings."""

    slope: float = 2.0
    """a of the teacher."""
    line: Line = field(default_factory=Line)
    """The student's."""
    output: str = "runs/mine/run"
    """Folder of the run."""
    resume: bool = False
    """Go on."""
    training: Training = Training(steps=3, batch_size=2)
    """Steps."""


tiny = Config(output="runs/mine/tiny", training=Training(steps=1, batch_size=2))


def main(config):
    student = network(config.line.start)
    run = Run(config.training, student=student, folder=config.output, config=config, resume=config.resume)
    for x in run.batches([1.0, 2.0, 3.0], points):
        run.update(((run.student(x) - config.slope * x) ** 2).sum(), len(x))
    run.finish()
'''

PIECES = '''from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Line:
    """A line."""

    start: float = 0.5
    """Where a begins."""


def network(start):
    student = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(student.weight, start)
    return student


def points(values):
    return torch.tensor(values)[:, None]
'''

REPRODUCTION = '''from preceptor.report.table import Table
from preceptor.statistics import Claim
IMPORT


def reproduce(seeds, folder, full):
    """One claim."""
    rows = {"slope": {"taught": Config().slope}}
    return Table("A line", ["taught"], rows, claims=[Claim("It is straight.", str(seeds), seeds < 4)])
'''


def folder(relative: bool = True) -> None:
    """Writes ``mine/`` into the current folder."""
    where = "." if relative else "mine."
    Path("mine").mkdir()
    recipe = RECIPE.replace("PIECES", f"from {where}pieces import Line, network, points\n")
    Path("mine/recipe.py").write_text(recipe, encoding="utf-8")
    Path("mine/pieces.py").write_text(PIECES, encoding="utf-8")
    text = REPRODUCTION.replace("IMPORT", f"from {where}recipe import Config\n")
    Path("mine/reproduction.py").write_text(text, encoding="utf-8")


def file() -> None:
    """Writes ``mine.py`` into the current folder, with a piece beside it."""
    recipe = RECIPE.replace("PIECES", "from pieces_of_mine import Line, network, points\n")
    Path("mine.py").write_text(recipe, encoding="utf-8")
    Path("pieces_of_mine.py").write_text(PIECES, encoding="utf-8")


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test imports from its own folder is not there for the next one."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {"mine", "pieces_of_mine"}:
            del sys.modules[name]


def measured(path: str) -> str:
    """What a run measured, without the time that it took."""
    lines = [json.loads(line) for line in Path(path, "metrics.jsonl").read_text().splitlines()]
    return json.dumps([(line["step"], line["loss"], line["gradient_norm"]) for line in lines])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence with which a command refuses."""
    capsys.readouterr()
    assert cli.main(list(words)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("preceptor: ")
    assert printed.count("\n") == 1
    return printed


@pytest.mark.parametrize("address", ["./mine", "mine/", "mine/recipe.py", "{here}/mine"])
def test_paths_of_one_method_are_one_method(address: str) -> None:
    folder()
    method = find_method(address.format(here=Path.cwd()))
    assert (method.name, method.address, method.built_in) == ("mine", "./mine", False)
    assert (method.title, method.requires) == ("Mine", "text")


@pytest.mark.parametrize("write", [file, folder, lambda: folder(relative=False)], ids=["file", "relative", "absolute"])
def test_it_runs_and_resumes_as_a_built_in_does(write, capsys: pytest.CaptureFixture[str]) -> None:
    write()
    address = "./mine.py" if Path("mine.py").exists() else "./mine"
    assert cli.main(["run", address, "--tiny", "--output", "out/short"]) == 0
    assert json.loads(Path("out/short/environment.json").read_text())["method"] == address
    assert cli.main(["run", address, "--line.start", "0.75", "--output", "out/whole"]) == 0
    words = ["run", address, "--config", "out/whole/config.json"]
    assert cli.main([*words, "--output", "out/again"]) == 0
    assert measured("out/again") == measured("out/whole")
    assert cli.main([*words, "--output", "out/again"]) == 2
    assert "out/again holds a run already: go on with --resume" in capsys.readouterr().err
    assert cli.main([*words, "--output", "out/again", "--resume"]) == 0
    assert measured("out/again") == measured("out/whole")


@pytest.mark.slow
def test_a_process_of_its_own_runs_it(root: Path) -> None:
    folder(relative=False)
    command = [sys.executable, "-m", "preceptor", "run", "./mine", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("runs/mine/tiny/config.json").is_file()


def test_list_and_show_read_it_without_importing_it(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    file()
    for words in (["list", "./mine"], ["list", "."], ["list", "./mine.py", "--markdown"], ["show", "./mine"]):
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert "a line through two points." in " ".join(shown.split())
        assert "On Lines" in shown
        assert "gkd" not in shown
    assert "line.start" in shown
    assert "0.5" in shown
    assert "preceptor run ./mine --SETTING" in shown
    assert "mine" not in sys.modules
    assert [setting.name for setting in read_settings(Path("mine.py"))][:3] == ["slope", "line", "line.start"]


def test_reproduce_runs_its_reproduction(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    assert cli.main(["reproduce", "./mine", "--seeds", "2"]) == 0
    assert json.loads(Path("runs/mine/reproduction/table.json").read_text())["rows"] == {"slope": {"taught": 2.0}}
    page = Path("runs/mine/reproduction/report.html").read_text()
    assert "Reproduction of mine" in page
    assert "preceptor reproduce ./mine" in page
    assert cli.main(["reproduce", "./mine", "--seeds", "4", "--output", "out"]) == 1


def test_the_page_of_a_run_names_the_method_wherever_the_run_lies(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    assert cli.main(["run", "./mine", "--tiny", "--output", "somewhere/else"]) == 0
    assert cli.main(["report", "somewhere/else"]) == 0
    page = Path("somewhere/else/report.html").read_text()
    assert "<dt>Method</dt><dd>Mine: a line through two points." in page
    assert "preceptor run ./mine --config somewhere/else/config.json" in page
    Path("mine").rename("yours")
    assert "<dt>Method</dt><dd>mine</dd>" in write_report("somewhere/else").read_text()


TEXTS = {
    "mine.py, line 1 is not Python": "def main(config:\n",
    "mine.py has no docstring": "x = 1\n",
    "mine.py has no Config": '"""Mine: x."""\n\ndef main(config): ...\n',
    "mine.py has no main": '"""Mine: x."""\n\nclass Config: ...\n',
}
REFUSED = {sentence: ("./mine.py", text) for sentence, text in TEXTS.items()} | {
    "There is no file absent.py": ("./absent.py", None),
    "There is no file absent": ("./absent/", None),
    ". holds no recipe.py: 'preceptor new NAME' writes": (".", None),
} | {
    "has the name of the built-in method 'gkd'": ("./gkd.py", '"""Mine: x."""\n'),
    "is not a name that Python can import": ("./my-own.py", '"""Mine: x."""\n'),
    "is not a Python file": ("./mine.txt", "a text"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["run", "show", "list", "reproduce"])
@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_no_recipe_is_refused_in_the_same_words_by_every_command(
    command: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    address, text = REFUSED[sentence]
    if text is not None:
        Path(address).write_text(text, encoding="utf-8")
    assert sentence in refusal(capsys, command, address)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("from .pieces", "from .piece", "./mine imports mine.piece, which is not there"),
        ("from .pieces", "import absent_package\nfrom .pieces", "./mine imports absent_package, not installed here"),
    ],
)
def test_an_import_that_fails_is_named(
    old: str, new: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "missing_packages", lambda extra: [])
    folder()
    recipe = Path("mine/recipe.py")
    recipe.write_text(recipe.read_text().replace(old, new), encoding="utf-8")
    assert sentence in refusal(capsys, "run", "./mine", "--tiny")


def test_an_extra_that_is_missing_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "missing_packages", lambda extra: ["torch"] if extra == "text" else [])
    folder()
    recipe = Path("mine/recipe.py")
    recipe.write_text(recipe.read_text().replace("from .pieces", "import absent_package\nfrom .pieces"))
    assert 'mine needs torch, not installed here: pip install "preceptor[text]"' in refusal(capsys, "run", "./mine")


def test_files_of_its_own_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    Path("mine/reproduction.py").write_text("", encoding="utf-8")
    assert "has no function reproduce(seeds, folder, full)" in refusal(capsys, "reproduce", "./mine")
    Path("mine/pieces.py").write_text("def f(:\n", encoding="utf-8")
    assert "pieces.py, line 1 is not Python" in refusal(capsys, "run", "./mine")


def test_a_name_that_python_has_already_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    Path("mine").rename("json")
    assert "Python has another module 'json'" in refusal(capsys, "run", "./json")


def test_a_method_without_a_reproduction_says_where_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    Path("mine/reproduction.py").unlink()
    file()
    assert "./mine.py has no reproduction: move it to mine/recipe.py" in refusal(capsys, "reproduce", "./mine.py")
    assert "./mine has no reproduction: write reproduction.py" in refusal(capsys, "reproduce", "./mine")


def test_a_bare_name_leads_to_the_path(capsys: pytest.CaptureFixture[str]) -> None:
    folder()
    assert "did you mean './mine'" in refusal(capsys, "run", "mine")
