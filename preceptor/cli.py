"""The command ``preceptor``: list, show, run, reproduce, new, chat, cache, evaluate, report, doctor.

A recipe or a command's module is imported only when it runs, so that ``--help`` and ``list`` need no torch.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

from preceptor.catalogue import Method, find_method, find_methods, find_methods_at
from preceptor.commands.method_modules import load_module
from preceptor.commands.screens import print_help, print_method, print_methods
from preceptor.errors import UserError
from preceptor.extras import missing_packages

EXTRAS = {"new": "", "chat": "people", "cache": "text", "evaluate": "text", "report": "report", "doctor": "text"}
"""Commands with a module of their own in ``preceptor.commands``, and the extra that each requires."""


UNMENDABLE_BY_CODE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


INTERRUPTED = 130


@dataclass(frozen=True)
class Reproduction:
    """How a reproduction is run."""

    seeds: int = 3
    """Seeds of each arm: a claim is made over all of them."""
    full: bool = False
    """The long form, at the size that the recipe's docstring names."""
    output: str = ""
    """Folder of the arms and of the table; default: runs/NAME/reproduction."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done; 1: a claim of a reproduction does not hold, or the doctor found that something does not fit; 2: a mismatch
    that the user can mend, reported in one sentence on stderr; 130: interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        return _complain(f"Stopped. Go on with: {_go_on(words)}", INTERRUPTED)
    except UserError as error:
        if debug:
            raise
        return _complain(str(error), 2)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").partition(".")[0] == "preceptor":
            raise
        return _complain(_missing(words, error.name or ""), 2)
    except OSError as error:
        if debug or error.errno not in UNMENDABLE_BY_CODE:
            raise
        where = f" {error.filename}" if error.filename else ""
        return _complain(f"Cannot write{where} ({error.strerror}): make room there, or choose another folder.", 2)


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in {"-h", "--help", "help"}:
        print_help()
    elif command in {"-V", "--version"}:
        print(import_module("preceptor").__version__)
    elif command == "list":
        places, markdown = _places(rest)
        methods = [method for place in places for method in find_methods_at(Path(place))] or find_methods()
        print_methods(methods, markdown=markdown)
    elif command == "show":
        print_method(find_method(_name(rest, command)))
    elif command == "run":
        return _run(find_method(_name(rest, command)), rest[1:])
    elif command == "reproduce":
        return _reproduce(find_method(_name(rest, command)), rest[1:])
    elif command in EXTRAS:
        module = import_module(f"preceptor.commands.{command}")
        return int(module.main(_parse(module.Config, rest, f"preceptor {command}", module.__doc__)) or 0)
    else:
        raise UserError(f"There is no command '{command}': {_nearest(command)}.")
    return 0


def _run(method: Method, words: list[str]) -> int:
    recipe = load_module(method, "recipe")
    default, words = _preset(method, recipe, words)
    config = _parse(recipe.Config, words, f"preceptor run {method.address}", recipe.__doc__, default)
    recipe.main(config)
    return 0


def _preset(method: Method, recipe: ModuleType, words: list[str]) -> tuple[Any, list[str]]:
    """The settings that ``--tiny``, ``--paper`` or ``--config F`` starts from, and the words that are left."""
    chosen = [word for word in words if word in {"--tiny", "--paper"}]
    words = [word for word in words if word not in chosen]
    if len(chosen) + ("--config" in words) > 1:
        raise UserError("--tiny, --paper and --config each name the settings to start from: give one of them.")
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise UserError("--config needs a file: give the config.json of a run's folder.")
        configuration = import_module("preceptor.engine.config_file")
        return configuration.read_config(recipe.Config, Path(words[at + 1])), words[:at] + words[at + 2 :]
    if not chosen:
        return None, words
    preset = chosen[0].removeprefix("--")
    if preset not in vars(recipe):
        raise UserError(f"{method.name} has no settings '{preset}': leave --{preset} out.")
    return vars(recipe)[preset], words


def _reproduce(method: Method, words: list[str]) -> int:
    about = f"Reproduce {method.name}'s claim over several seeds."
    settings = _parse(Reproduction, words, f"preceptor reproduce {method.address}", about)
    if settings.seeds < 1:
        raise UserError(f"--seeds is {settings.seeds}: give at least 1, and 3 for a claim.")
    experiment = load_module(method, "reproduction")
    if not hasattr(experiment, "reproduce"):
        raise UserError(f"{experiment.__file__} has no function reproduce(seeds, folder, full): write it.")
    folder = Path(settings.output or f"runs/{method.name}/reproduction")
    folder.mkdir(parents=True, exist_ok=True)
    table = experiment.reproduce(settings.seeds, folder, settings.full)
    environment = {"method": method.address, "seeds": settings.seeds, "full": settings.full}
    _write(folder / "environment.json", json.dumps(environment, indent=2) + "\n")
    _write(folder / "table.json", json.dumps(table.json(), indent=2, ensure_ascii=False) + "\n")
    _write(folder / "table.md", table.markdown() + "\n")
    table.print()
    print(f"The table: {folder / 'table.md'}")
    print(f"The page: {import_module('preceptor.report').write_report(folder)}")
    return 0 if table.holds else 1


def _parse(kind: type, words: list[str], program: str, description: str | None, default: Any = None) -> Any:
    import tyro

    summary = (description or "").strip().partition("\n")[0]
    start = tyro.MISSING_NONPROP if default is None else default
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(kind, args=words, prog=program, description=summary, default=start)
    except SystemExit as stop:
        # A setting that its dataclass refuses is reported in one sentence, without tyro's frame around it.
        cause = stop.__context__
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(complaint.getvalue())
        raise


def _name(words: list[str], command: str) -> str:
    if words and words[0] in {"-h", "--help"}:
        print_help(command)
        raise SystemExit(0)
    if not words or words[0].startswith("-"):
        raise UserError(f"'preceptor {command}' needs the name of a recipe: 'preceptor list' shows them.")
    return words[0]


def _places(words: list[str]) -> tuple[list[str], bool]:
    """The paths that ``list`` was given, and whether to print Markdown."""
    if words and words[0] in {"-h", "--help"}:
        print_help("list")
        raise SystemExit(0)
    places = [word for word in words if not word.startswith("-")]
    unknown = [word for word in words if word not in {*places, "--markdown"}]
    if unknown:
        raise UserError(f"'preceptor list' does not take '{unknown[0]}': it takes --markdown, and paths.")
    return places, "--markdown" in words


def _nearest(command: str) -> str:
    import difflib

    names = ["list", "show", "run", "reproduce", *EXTRAS]
    near = difflib.get_close_matches(command, names, n=1)
    return f"did you mean '{near[0]}'" if near else f"there are {', '.join(names)}"


def _missing(words: list[str], module: str) -> str:
    """The line that installs what a command lacks: the extra that its recipe or its module requires."""
    command, name = words[0], words[1] if len(words) > 1 else ""
    recipe = find_method(name) if command in {"run", "reproduce"} else None
    extra = recipe.requires if recipe else EXTRAS.get(command, "all")
    needs = recipe.name if recipe else f"preceptor {command}"
    lacking = missing_packages(extra)
    if recipe is not None and not recipe.built_in and not lacking:
        return f"{recipe.address} imports {module}, not installed here: install it, or correct the import."
    return f'{needs} needs {", ".join(lacking or [module])}, not installed here: pip install "preceptor[{extra}]"'


def _go_on(words: list[str]) -> str:
    resume = ["--resume"] if words[:1] == ["run"] and "--resume" not in words else []
    return shlex.join(["preceptor", *words, *resume])


def _write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _complain(sentence: str, status: int) -> int:
    print(f"preceptor: {sentence}", file=sys.stderr)
    return status
