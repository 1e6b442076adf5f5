import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from preceptor import cli
from preceptor.catalogue import find_methods, read_method, read_settings
from preceptor.engine.config_file import read_config
from preceptor.errors import UserError
from preceptor.extras import missing_packages

RECIPE = '''"""Echo: repeats what it is given.

Paper: On Saying It Again (Echo, 2026), https://example.org/echo; and its
sequel, https://example.org/again.
Reproduction: holds in part (one of two arms)

It repeats x.
"""

from dataclasses import dataclass, field

REQUIRES = "text"


@dataclass(frozen=True)
class Part:
    size: int = 3
    """Its size."""


@dataclass(frozen=True)
class Config:
    word: str = "hello"
    """What is repeated."""
    part: Part = field(default_factory=Part)
    """A part."""
    output: str = "runs/echo"
    """Folder of the run."""


tiny = Config(word="hi")


def main(config):
    print("echo", config.word, config.part.size)
'''


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "preceptor", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of methods with the recipe above, in the place of the package's own."""
    folder = tmp_path / "methods"
    (folder / "echo").mkdir(parents=True)
    (folder / "echo" / "recipe.py").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr("preceptor.methods.__path__", [str(folder)])
    monkeypatch.setattr("preceptor.catalogue.RECIPES", folder)
    for name in ("find_method", "find_methods"):
        function = getattr(sys.modules["preceptor.catalogue"], name)
        monkeypatch.setattr(function, "__defaults__", (folder,))
    yield folder
    for name in ("preceptor.methods.echo.recipe", "preceptor.methods.echo.reproduction", "preceptor.methods.echo"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--markdown"], ["--version"], ["run", "--help"]])
def test_light_commands_import_no_torch(words: list[str]) -> None:
    script = (
        "import sys\nfrom preceptor.cli import main\n"
        f"try:\n    status = main({words!r})\nexcept SystemExit as stop:\n    status = stop.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'tyro', 'datasets'} & set(sys.modules)\n"
        "assert not status, status\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_help_of_a_method_or_a_command_imports_no_model_library() -> None:
    """``--help`` of each, one after another in one process."""
    every = [["run", method.name] for method in find_methods()] + [[name] for name in cli.EXTRAS]
    assert len(every) > 6
    script = (
        "import sys\nfrom preceptor.cli import main\n"
        f"for words in {every!r}:\n"
        "    try:\n        status = main([*words, '--help'])\n"
        "    except SystemExit as stop:\n        status = stop.code\n"
        "    heavy = {'transformers', 'peft', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "    assert not status, (words, status)\n    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: preceptor") == len(every)


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    for command in ("list", "show", "run", "reproduce", "new", "chat", "cache", "evaluate", "report", "doctor"):
        assert command in shown.stdout


def test_list_shows_every_method_without_importing_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in find_methods():
        monkeypatch.delitem(sys.modules, f"preceptor.methods.{method.name}.recipe", raising=False)
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    assert find_methods()
    for method in find_methods():
        assert method.name in shown
        assert f"preceptor.methods.{method.name}.recipe" not in sys.modules


def test_show_prints_docstring_and_settings(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "echo"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "On Saying It Again",
        "example.org/echo",
        "holds in part",
        "It repeats x",
        "part.size",
        "Config(word='hi')",
    ):
        assert expected in shown


def test_a_recipe_is_read_from_its_source(recipes: Path) -> None:
    method = read_method(recipes / "echo" / "recipe.py")
    assert (method.name, method.title, method.requires) == ("echo", "Echo", "text")
    assert method.summary == "repeats what it is given."
    assert method.paper == "On Saying It Again (Echo, 2026)"
    assert method.link == "https://example.org/echo"
    assert method.reproduction == "holds in part (one of two arms)"
    assert method.text == "It repeats x."
    assert [setting.name for setting in read_settings(method.path)] == ["word", "part", "part.size", "output"]
    assert read_settings(method.path)[2].default == "3"


def test_run_takes_fields_presets_and_a_config(recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "echo", "--word", "yes", "--part.size", "5"]) == 0
    assert cli.main(["run", "echo", "--tiny"]) == 0
    Path("config.json").write_text('{"word": "from a file", "part": {"size": 9}}', encoding="utf-8")
    assert cli.main(["run", "echo", "--config", "config.json", "--part.size", "7"]) == 0
    assert capsys.readouterr().out.splitlines() == ["echo yes 5", "echo hi 3", "echo from a file 7"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "ecoh"], "did you mean 'echo'"),
        (["show", "zzzzzz"], "there are echo"),
        (["rnu", "echo"], "did you mean 'run'"),
        (["run"], "needs the name of a recipe"),
        (["run", "echo", "--paper"], "no settings 'paper'"),
        (["run", "echo", "--tiny", "--config", "x"], "give one of them"),
        (["run", "echo", "--config"], "--config needs a file"),
        (["run", "echo", "--config", "absent.json"], "no file absent.json"),
        (["list", "--all"], "does not take '--all'"),
        (["reproduce", "echo", "--seeds", "0"], "--seeds is 0"),
        (["reproduce", "echo"], "echo has no reproduction"),
    ],
)
def test_mistakes_give_one_sentence_and_status_2(
    recipes: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert cli.main(words) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert printed.count("\n") == 1
    assert "Traceback" not in printed


def test_debug_shows_the_traceback() -> None:
    plain, full = run("run", "gdk"), run("run", "gdk", "--debug")
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert full.returncode == 1
    assert "Traceback" in full.stderr
    assert "UserError" in full.stderr


def test_unknown_field_exits_with_2(recipes: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "echo", "--wrod", "x"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("raise KeyboardInterrupt", "Go on with: preceptor run echo --word x --resume"),
        ("import a_package_that_is_absent", 'pip install "preceptor[text]"'),
        ("raise PermissionError(13, 'Permission denied', 'runs')", "Cannot write runs (Permission denied)"),
        ("raise OSError(28, 'No space left on device', 'student.safetensors')", "student.safetensors"),
    ],
)
def test_what_ends_a_run_is_reported(
    recipes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, sentence: str
) -> None:
    monkeypatch.setattr(cli, "missing_packages", lambda extra: None)
    (recipes / "echo" / "recipe.py").write_text(RECIPE + f"    {line}\n", encoding="utf-8")
    status = cli.main(["run", "echo", "--word", "x"])
    assert status == (130 if "Keyboard" in line else 2)
    assert sentence in capsys.readouterr().err


def test_a_fault_of_ours_is_not_hidden(recipes: Path) -> None:
    (recipes / "echo" / "recipe.py").write_text(RECIPE + "    import preceptor.no_such_module\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["run", "echo"])


def test_missing_packages_are_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "rich>=13",
        'torch_absent>=2.6; extra == "text"',
        "pytest>=8 ; extra == 'text'",
        'other; extra == "web"',
    ]
    monkeypatch.setattr("preceptor.extras.metadata.requires", lambda name: required)
    assert missing_packages("text") == ["torch_absent"]
    assert missing_packages("report") == []


REPRODUCTION = """
import json


class Table:
    def __init__(self, holds):
        self.holds = holds

    def json(self):
        return {"holds": self.holds}

    def markdown(self):
        return "| a |"

    def print(self):
        print("the table")


def reproduce(seeds, folder, full):
    return Table(HOLDS and seeds == 2 and not full)
"""


@pytest.mark.parametrize("holds", [True, False])
def test_reproduce_writes_the_table_and_fails_with_the_claim(
    recipes: Path, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    page = ModuleType("preceptor.report")
    page.write_report = lambda folder: folder / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "preceptor.report", page)
    text = REPRODUCTION.replace("HOLDS", str(holds))
    (recipes / "echo" / "reproduction.py").write_text(text, encoding="utf-8")
    assert cli.main(["reproduce", "echo", "--seeds", "2", "--output", "out"]) == (0 if holds else 1)
    assert json.loads(Path("out/table.json").read_text()) == {"holds": holds}
    assert json.loads(Path("out/environment.json").read_text()) == {"method": "echo", "seeds": 2, "full": False}
    assert Path("out/table.md").read_text() == "| a |\n"


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    steps: int | None = None
    inner: Inner = field(default_factory=Inner)
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    on: bool = False


def written(value: object) -> Path:
    path = Path("config.json")
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_settings_come_back_as_they_were_written() -> None:
    value = {"steps": None, "inner": {"rate": 1, "kind": "b"}, "names": ["x"], "pair": [2, 3], "on": True}
    assert read_config(Outer, written(value)) == Outer(None, Inner(1.0, "b"), ("x",), (2, 3.0), True)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"stepss": 1}, "did you mean 'steps'"),
        ({"inner": {"rat": 1}}, "inner has a field 'rat'"),
        ({"steps": "ten"}, "must be a whole number"),
        ({"steps": True}, "must be a whole number"),
        ({"steps": 1.5}, "must be a whole number"),
        ({"inner": {"kind": "c"}}, "choose one of a, b"),
        ({"names": "x"}, "must be a JSON list"),
        ({"pair": [1]}, "must have 2 items"),
        ({"on": 1}, "true or false"),
        ([1], "must be a JSON object"),
    ],
)
def test_settings_that_do_not_fit_are_refused(value: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_config(Outer, written(value))


def test_a_config_that_is_not_json_is_refused() -> None:
    Path("config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(Outer, Path("config.json"))
