"""``preceptor new``: the folder that it writes runs, reproduces and tests itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor import cli
from preceptor.catalogue import read_method, read_settings
from preceptor.commands.new import TEMPLATE


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the method ``mine`` was written."""
    place = tmp_path_factory.mktemp("place")
    before = Path.cwd()
    os.chdir(place)
    try:
        assert cli.main(["new", "mine"]) == 0
    finally:
        os.chdir(before)
    return place


def run(place: Path, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_folder_is_whole_and_bears_its_name(place: Path) -> None:
    files = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    written = {"__init__.py", "digits.py", "recipe.py", "reproduction.py", "tests/__init__.py", "tests/test_mine.py"}
    assert files == {f"mine/{name}" for name in written}
    assert not [name for name in files if "template" in (place / name).read_text(encoding="utf-8")]
    method = read_method(place / "mine" / "recipe.py")
    assert (method.name, method.requires, method.reproduction) == ("mine", "vision", "not yet run")
    assert method.link == "https://arxiv.org/abs/1503.02531"
    settings = read_settings(method.path)
    assert {"output", "resume", "training"} <= {setting.name for setting in settings}
    assert all(setting.help for setting in settings)


@pytest.mark.slow
def test_it_runs_and_its_claims_hold(place: Path, root: Path) -> None:
    command = [sys.executable, "-m", "preceptor"]
    run(place, root, *command, "run", "./mine", "--tiny")
    assert (place / "runs/mine/tiny/report.html").is_file()
    reproduced = run(place, root, *command, "reproduce", "./mine").stdout
    assert reproduced.count("holds:") == 2
    assert (place / "runs/mine/reproduction/report.html").is_file()


@pytest.mark.slow
def test_its_tests_pass(place: Path, root: Path) -> None:
    done = run(place, root, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mine")
    assert "7 passed" in done.stdout


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my-own", "is not a name that Python can import"),
        ("a/b", "is not a name that Python can import"),
        ("class", "is not a name that Python can import"),
        ("gkd", "There is a built-in method 'gkd'"),
        ("json", "Python has another module 'json'"),
        ("there", "there exists already"),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there").mkdir()
    assert cli.main(["new", name]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["there"]
    assert not list(Path("there").iterdir())


def test_a_folder_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["new", "mine"]) == 0
    Path("mine/recipe.py").write_text("changed", encoding="utf-8")
    assert cli.main(["new", "mine"]) == 2
    assert Path("mine/recipe.py").read_text(encoding="utf-8") == "changed"


def test_the_template_lies_in_the_package(root: Path) -> None:
    assert TEMPLATE.is_relative_to(root / "preceptor")
    assert len(list(TEMPLATE.rglob("*.py"))) == 6
