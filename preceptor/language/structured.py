"""Answers that are JSON of a given schema: asked for, found in the text, mended, checked, and asked for again."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from preceptor.errors import UserError
from preceptor.language.messages import Request

FENCED = re.compile(r"```[\w-]*[ \t]*\n(.*?)\n?[ \t]*(?:```)?", re.DOTALL)


BRACKET = re.compile(r"[{\[]")


STRING_OR_COMMA = re.compile(r'"(?:[^"\\]|\\.)*"|,(?=\s*[\]}])', re.DOTALL)


LONGEST_REASON = 300


def check_schema(schema: dict[str, Any]) -> None:
    """Refuse a schema that is none.

    Raises:
        UserError: it is no JSON schema, it refers to another file or to a part that it lacks, or the package that reads
            schemas is missing.
    """
    jsonschema = _jsonschema()
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"The schema of a structured answer is no JSON schema ({error.message}): mend it.") from error
    if elsewhere := next((name for name in _references(schema) if not name.startswith("#")), ""):
        raise UserError(f"The schema of a structured answer refers to {elsewhere}: write that part into the schema.")
    referencing = _referencing()
    root = referencing.Registry().resolver_with_root(referencing.jsonschema.DRAFT202012.create_resource(schema))
    for name in _references(schema):
        try:
            root.lookup(name)
        except referencing.exceptions.Unresolvable as error:
            raise UserError(f"The schema of a structured answer refers to {name}, which it lacks: add it.") from error


def object_schema(**properties: Any) -> dict[str, Any]:
    """The JSON schema of an object with these properties, all of them required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def instructed(request: Request) -> Request:
    """The request with its schema, if it has one, shown to the model at the end of the last message."""
    if request.schema is None:
        return request
    instruction = (
        "Answer with one JSON value and nothing else. It must fit this JSON schema:\n"
        f"{json.dumps(request.schema, ensure_ascii=False)}"
    )
    *before, last = request.messages
    return replace(request, messages=(*before, {**last, "content": f"{last['content']}\n\n{instruction}"}))


def corrected(call: Request, text: str, reason: str) -> Request:
    """The request that follows on an answer that does not fit: the answer, and what is wrong with it."""
    instruction = f"That answer cannot be used: {reason}. Answer again, with the corrected JSON value and nothing else."
    exchange = ({"role": "assistant", "content": text}, {"role": "user", "content": instruction})
    return replace(call, messages=(*call.messages, *exchange))


def read_json(text: str, schema: dict[str, Any], *, cut: bool = False) -> tuple[Any, str]:
    """The value in an answer, and an empty reason; or None and what is wrong, in words that a model understands.

    The value may stand in a code fence or between other text, and may have commas before a closing bracket and line
    breaks inside strings; nothing else is mended, and nothing is added that was not there. Of several values the first
    that fits the schema is taken. ``cut``: whether the answer was cut off, which is then what is wrong with it.
    """
    # An empty registry: nothing that a schema refers to is ever fetched.
    validator = _jsonschema().Draft202012Validator(schema, registry=_referencing().Registry())
    reason = ""
    try:
        for value in map(_sound, _values(text)):
            wrong = min(validator.iter_errors(value), key=lambda error: len(error.path), default=None)
            if wrong is None:
                return value, ""
            place = "".join(f"[{step!r}]" for step in wrong.absolute_path)
            reason = reason or f"{f'at {place} ' if place else ''}{_shorten(wrong.message)}"
    except RecursionError:  # a schema that refers to itself follows the value down
        reason = reason or "it is nested too deeply"
    if cut:
        return None, "it was cut off because it is too long, so it must be shorter"
    return None, reason or f"it holds no complete JSON value ({_complaint(text)})"


def _values(text: str) -> Iterator[Any]:
    """The JSON values in a text that are not inside another: the whole of it or of its fence, then those in between.

    Where a value begins well and breaks off, what follows may be a part of it: nothing is taken from there on.
    """
    rest = text.strip()
    fenced = FENCED.fullmatch(rest)
    for form in (rest, fenced.group(1).strip()) if fenced else (rest,):
        try:
            value, end = _decode(form)
        except json.JSONDecodeError:
            continue
        if end == len(form):
            yield value
    while found := BRACKET.search(rest):
        rest = rest[found.start() :]
        for form in (rest, STRING_OR_COMMA.sub(_keep_string, rest)):
            try:
                value, end = _decode(form)
            except json.JSONDecodeError as error:
                broken = error.pos
                continue
            yield value
            rest = form[end:]
            break
        else:
            if rest[1:broken].strip():
                return
            rest = rest[1:]


def _decode(text: str) -> tuple[Any, int]:
    """The value that a text begins with, and where it ends."""
    try:
        return _DECODER.raw_decode(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, len(text)) from error
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python reads no integer of more digits than sys.get_int_max_str_digits
        raise json.JSONDecodeError("a number has too many digits", text, len(text)) from error


def _sound(value: Any) -> Any:
    """The value with a question mark for each half of a character: JSON may bring one, and no tokenizer takes it."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode())


def _keep_string(found: re.Match[str]) -> str:
    return "" if found.group() == "," else found.group()


def _references(schema: Any) -> Iterator[str]:
    parts = schema.items() if isinstance(schema, dict) else enumerate(schema) if isinstance(schema, list) else ()
    for name, part in parts:
        if name in ("$ref", "$dynamicRef") and isinstance(part, str):
            yield part
        yield from _references(part)


def _complaint(text: str) -> str:
    start = BRACKET.search(text)
    try:
        _decode(text[start.start() :] if start else text)
    except json.JSONDecodeError as error:
        return str(error)
    return "it ends too early"


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."


def _refuse(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is not JSON", name, 0)


# Line breaks inside strings are let through; NaN and Infinity, which JSON does not know, are not.
_DECODER = json.JSONDecoder(strict=False, parse_constant=_refuse)


def _jsonschema() -> Any:
    if importlib.util.find_spec("jsonschema") is None:
        raise UserError('A structured answer needs the package jsonschema: run `pip install "preceptor[teachers]"`.')
    import jsonschema

    return jsonschema


def _referencing() -> Any:
    import referencing.exceptions
    import referencing.jsonschema

    return referencing
