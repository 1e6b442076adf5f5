"""The commands that README, docs and recipes show are run, in the order of their page, at the smallest settings.

A small model with SmolLM2's tokens stands for the models that pages name, but where a method needs right answers: what
is tested is that a command that a reader copies goes through, and every method's own ``tiny`` run loads the real ones.
A reproduction's experiment is left out.
"""

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preceptor.catalogue import find_methods, read_settings
from preceptor.cli import main
from preceptor.dialogue.dialogue import write_dialogues
from preceptor.dialogue.examples import worked_dialogues
from preceptor.report.table import Table
from preceptor.statistics import Claim
from preceptor.vision.images import FASHION_MNIST
from tests.small_llama import small_llama

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = {method.name: method for method in find_methods()}
RUNS_ALONE = {"list", "chat", "doctor"}
"""Commands that need no further word."""
FILLED_IN = {"NAME", "METHOD", "FOLDER"}
"""Words that the reader fills in."""
ENOUGH = ["--training.steps", "12", "--training.evaluate-every", "1"]
"""For ``--watch-hacking``, which refuses a run with fewer evaluations than its law needs."""


def commands(text: str) -> list[list[str]]:
    """The words of each ``preceptor ...`` in a page: lines of code blocks, and code within a sentence."""
    text = re.sub(r" *\\\n +", " ", text)
    blocks = re.findall(r"^    (?:accelerate launch .*-m )?(preceptor [^#\n]*)", text, re.MULTILINE)
    inline = re.findall(r"`+(preceptor [^`\n]*)`+", text)
    shown = [part.strip() for line in [*blocks, *inline] for part in line.split("&&")]
    words = [shlex.split(line.removeprefix("preceptor ")) for line in dict.fromkeys(shown)]
    return [one for one in words if len(one) > 1 or one[0] in RUNS_ALONE]


def smallest(words: list[str], number: int) -> list[str]:
    """A command with names filled in, small models, and a run with the smallest settings and a folder of its own."""
    command, *rest = words
    if command in {"run", "reproduce", "show"}:
        rest[0] = "gkd" if rest[0] in FILLED_IN else rest[0]
    if command == "new":
        return [command, "mine" if rest[0] in FILLED_IN else rest[0]]
    model = "smollm2" if rest[:1] == ["soft_bootstrapping"] else "small"
    rest = [model if word in {*FILLED_IN, "smollm2"} else word for word in rest]
    if command == "run":
        return [command, rest[0], "--tiny", *smaller(rest[0], rest[1:], model, number)]
    if command == "cache" and "--teacher" not in rest:
        rest += ["--teacher", model]
    return [command, *rest, *(["--output", f"chats/{number}"] if command == "chat" else [])]


def smaller(name: str, flags: list[str], model: str, number: int) -> list[str]:
    """The flags of a run without its preset, with the model where SmolLM2 is the default."""
    flags = [flag for flag in flags if flag not in {"--tiny", "--paper"}]
    flags += ["--output", f"runs/{number}"] if "--output" not in flags else []
    flags += ENOUGH if "--watch-hacking" in flags else ["--training.steps", "4"] if "--oracle" in flags else []
    settings = read_settings(METHODS[name].path) if name in METHODS else []
    asked = [
        f"--{one.name.replace('_', '-')}" for one in settings if one.default == "'smollm2'" and "." not in one.name
    ]
    return flags + [word for flag in asked if flag not in flags for word in (flag, model)]


def runs_here(words: list[str]) -> bool:
    """Whether a command's data is there: DistillKit's captures (see its own test) and Debian's images need not be."""
    return "--distillkit" not in words and ("fashion-mnist" not in words or FASHION_MNIST.is_dir())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A folder with a model of SmolLM2's tokens and 16 layers, each of 16 units."""
    folder = tmp_path_factory.mktemp("small")
    small_llama(0, layers=16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lay_out_files(small: Path) -> None:
    """The files that pages name as the reader's own, and the small model."""
    shutil.copytree(small, "small")
    lessons = [{"prompt": f"What is {i} + {i}?", "completion": f"{2 * i}, of course."} for i in range(12)]
    sums = [(a, b) for a in (11, 12, 13, 14, 21, 22, 23) for b in (5, 6, 12, 15, 20, 21)]
    questions = [{"question": f"What is {a} + {b}?", "answer": f"= {a + b}.\n#### {a + b}"} for a, b in sums]
    Path("gsm8k").mkdir()
    for name, rows in {"lessons": lessons, "gsm8k/train": questions, "gsm8k/test": questions}.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for folder in (".", "mathdial"):
        write_dialogues(Path(folder, "test.jsonl"), worked_dialogues())


def an_experiment(seeds: int, folder: Path, full: bool) -> Table:
    """In place of a reproduction, which takes minutes: a table with a claim that holds."""
    return Table("a table", ["a column"], claims=[Claim("a claim", "1 of 1", holds=True)])


def pages() -> list[Any]:
    """Each page with its commands, and each recipe with that of its docstring; a run that stands twice once."""
    found = [(path.stem, commands(path.read_text(encoding="utf-8"))) for path in PAGES]
    found += [(name, commands(f"`{method.command}`")) for name, method in METHODS.items()]
    seen: list[list[str]] = []
    for _, shown in found:
        kept = []
        for words in shown:
            plain = [word for word in words if word not in {"--tiny", "--paper"}]
            kept += [words] if words[0] != "run" or plain not in seen else []
            seen.append(plain)
        shown[:] = kept
    return [pytest.param(words, id=name) for name, words in found if words]


def test_commands_are_found_in_blocks_and_in_sentences() -> None:
    text = "Try `preceptor list`:\n\n    preceptor run gkd --a 1 \\\n        --b 2   # so\n"
    text += "    preceptor new x && preceptor show x\n"
    assert commands(text) == [["run", "gkd", "--a", "1", "--b", "2"], ["new", "x"], ["show", "x"], ["list"]]


@pytest.fixture
def no_own_method_is_loaded() -> Iterator[None]:
    """A page's own method is imported by its name, which other tests use as well."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
            del sys.modules[name]
        sys.path[:] = [
            place for place in sys.path if not any(Path(place, name).exists() for name in ("mine", "mine.py"))
        ]
        importlib.invalidate_caches()

    forget()
    yield
    forget()


@pytest.mark.slow
@pytest.mark.usefixtures("no_own_method_is_loaded")
@pytest.mark.parametrize("shown", pages())
def test_the_commands_of_a_page_run(shown: list[list[str]], small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out_files(small)

    def end_of_input(prompt: str = "") -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end_of_input)
    for method in METHODS:
        reproduction = importlib.import_module(f"preceptor.methods.{method}.reproduction")
        monkeypatch.setattr(reproduction, "reproduce", an_experiment)
    for number, words in enumerate(shown):
        if runs_here(words):
            assert main(smallest(words, number)) == 0, shlex.join(words)
