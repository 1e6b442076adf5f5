"""Write a method of your own: a folder with a recipe, its reproduction and its test, which run as they are.

    preceptor new mine && preceptor run ./mine --tiny && preceptor reproduce ./mine

The template teaches a small network from the soft targets of a large one. Change it piece by piece into your method.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from preceptor.catalogue import find_methods
from preceptor.errors import UserError

TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Config:
    """How the method is called."""

    name: Positional[str]
    """The method's name, and its folder's: letters, digits and underscores."""


def main(config: Config) -> None:
    """Write the folder, whole or not at all, and print the commands to go on with.

    Raises:
        UserError: the name is none that Python can import, is taken, or the folder is there.
    """
    folder = _free(config.name)
    beside = Path(f".{folder}.part")
    shutil.rmtree(beside, ignore_errors=True)
    for path in sorted(TEMPLATE.rglob("*.py")):
        place = beside / str(path.relative_to(TEMPLATE)).replace("template", config.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(path.read_text(encoding="utf-8").replace("template", config.name), encoding="utf-8")
    os.rename(beside, folder)
    print(f"{folder}/ holds a method that runs as it is:\n")
    for command, purpose in (
        (f"preceptor run ./{folder} --tiny", "the run"),
        (f"preceptor reproduce ./{folder}", "the claim, beside its baseline and its control"),
        (f"preceptor show ./{folder}", "its page"),
        (f"pytest {folder}", "its tests"),
    ):
        print(f"    {command:<40} {purpose}")


def _free(name: str) -> Path:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"'{name}' is not a name that Python can import: use letters, digits and underscores.")
    if name in {method.name for method in find_methods()}:
        raise UserError(f"There is a built-in method '{name}': choose another name.")
    if Path(name).exists():
        raise UserError(f"{name} exists already: choose another name.")
    if importlib.util.find_spec(name) is not None:
        raise UserError(f"Python has another module '{name}': choose another name.")
    return Path(name)
