"""Import a method's modules: those of a built-in from this package, those of any other from its own folder.

A method of your own is the package that its folder is (``mine.recipe``, ``mine.reproduction``), or the module that its
file is (``mine``). Its pieces import each other relatively (``from .pieces import x``) or absolutely (``from
mine.pieces import x``).
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from preceptor.catalogue import Method
from preceptor.errors import UserError


def load_module(method: Method, piece: Literal["recipe", "reproduction"]) -> ModuleType:
    """Import a method's recipe or reproduction.

    Raises:
        UserError: the method has no reproduction, a file of its own is not Python or absent, or its name is taken.
        ModuleNotFoundError: a package is not installed.
    """
    alone = method.path.name != "recipe.py"
    if piece == "reproduction":
        _check_reproduction(method, alone)
    if method.built_in:
        return import_module(f"preceptor.methods.{method.name}.{piece}")
    _make_importable(method.name, method.path if alone else method.path.parent)
    try:
        return import_module(method.name if alone else f"{method.name}.{piece}")
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno} is not Python ({error.msg}): correct it.") from error
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != method.name:
            raise
        raise UserError(f"{method.address} imports {error.name}, which is not there: correct the import.") from error


def _check_reproduction(method: Method, alone: bool) -> None:
    path = method.path.with_name("reproduction.py")
    if alone:
        raise UserError(
            f"{method.address} has no reproduction: move it to {method.name}/recipe.py, with a reproduction.py beside "
            "it ('preceptor new NAME' writes an example)."
        )
    if not path.is_file():
        raise UserError(
            f"{method.address} has no reproduction: write {path.name} with reproduce(seeds, folder, full) "
            "('preceptor new NAME' writes an example)."
        )


def _make_importable(name: str, place: Path) -> None:
    """Let Python find the module ``name`` at ``place``.

    The folder above goes to the end of ``sys.path``, where processes that this one starts look too.

    Raises:
        UserError: another module has that name.
    """
    above = str(place.parent)
    if above not in sys.path:
        sys.path.append(above)
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(name)
    found = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
    if str(place) not in [str(Path(one).resolve()) for one in found if one]:
        raise UserError(f"Python has another module '{name}' ({found[-1] if found else 'unknown'}): rename {place}.")
