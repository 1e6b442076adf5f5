"""A run's ``config.json`` read back into the dataclass that it was written from, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from preceptor.errors import UserError

T = TypeVar("T")


def read_config(kind: type[T], path: Path) -> T:
    """The dataclass ``kind`` from the JSON file ``path``: every key known, every value of its type.

    Raises:
        UserError: the file is not there, is not JSON, or holds a key or a value that ``kind`` does not take.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: give the config.json of a run's folder.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the config.json in it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}): give the config.json of a run's folder.") from None
    return _build(kind, value, str(path))


def _build(kind: type[T], value: object, where: str) -> T:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object with the fields of {kind.__name__}, and is {_shown(value)}.")
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    for key in value:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0)[0]
            raise UserError(f"{where} has a field '{key}', which {kind.__name__} has not: did you mean '{near}'?")
    try:
        return kind(**{key: _value(hints[key], item, f"{where}: {key}") for key, item in value.items()})
    except TypeError as error:
        raise UserError(f"{where} does not fill {kind.__name__} ({error}): add what is missing.") from None


def _value(kind: Any, value: object, where: str) -> Any:
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        return _one_of(get_args(kind), value, where)
    if origin is Literal:
        if value not in get_args(kind):
            raise UserError(f"{where} is {_shown(value)}: choose one of {', '.join(map(str, get_args(kind)))}.")
        return value
    if origin in (list, tuple):
        return _items(origin, get_args(kind), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a JSON object, and is {_shown(value)}.")
        return {key: _value(get_args(kind)[1], item, f"{where}.{key}") for key, item in value.items()}
    return _single(kind, value, where)


def _single(kind: Any, value: object, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build(kind, value, where)
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not kind:
        raise UserError(f"{where} must be {_named(kind)}, and is {_shown(value)}.")
    return value


def _one_of(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    refusals = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _value(kind, value, where)
            except UserError as error:
                refusals.append(error)
    raise refusals[0]


def _items(origin: Any, kinds: tuple[Any, ...], value: object, where: str) -> Any:
    if not isinstance(value, list):
        raise UserError(f"{where} must be a JSON list, and is {_shown(value)}.")
    repeated = origin is list or (len(kinds) == 2 and kinds[1] is Ellipsis)
    if not repeated and len(kinds) != len(value):
        raise UserError(f"{where} must have {len(kinds)} items, and has {len(value)}.")
    wanted = [kinds[0]] * len(value) if repeated else list(kinds)
    return origin(_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(wanted, value)))


def _named(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
