"""Plain values on their way from a program to its judge, and the tests that they are compared with.

The program's process writes values as JSON; the judge reads and compares them in a process of its own, where nothing
that the program has redefined exists. A value is an exact built-in type or it is refused, so that no ``__eq__`` of the
program is ever asked.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any

from preceptor.errors import UserError

LONGEST_TEST = 2000  # characters of one line


@dataclass(frozen=True)
class Expectation:
    """A call, which the program's process evaluates, and the value expected of it, which that process never sees."""

    call: str
    expected: Any


def read_tests(text: str) -> list[Expectation]:
    """The tests of a text, one a line: ``f(2, 3) == 5``, with or without ``assert`` before it.

    The left side calls the program and compares nothing itself (a program could redefine what a comparison says); the
    right side is a literal.

    Raises:
        UserError: there is no test, or a line has another form; the line is given.
    """
    tests = [_read_test(line.strip()) for line in text.splitlines() if line.strip()]
    if not tests:
        raise UserError("The program has no test to be judged by; give lines such as f(2, 3) == 5.")
    return tests


def _read_test(line: str) -> Expectation:
    refusal = UserError(
        f"The test {line[:80]!r} cannot be read; write a call of the program, ==, and a literal value: f(2, 3) == 5."
    )
    if len(line) > LONGEST_TEST:
        raise refusal
    try:
        tree = ast.parse(line.removeprefix("assert "), mode="eval").body
        if not isinstance(tree, ast.Compare) or not isinstance(tree.ops[0], ast.Eq | ast.Is) or len(tree.ops) > 1:
            raise refusal
        expected = ast.literal_eval(tree.comparators[0])
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise refusal from error
    nodes = list(ast.walk(tree.left))
    if any(isinstance(node, ast.Compare | ast.BoolOp | ast.Not | ast.Lambda) for node in nodes):
        raise refusal
    if not any(isinstance(node, ast.Call) for node in nodes):
        raise refusal
    return Expectation(ast.unparse(tree.left), expected)


def encode(value: Any) -> Any:
    """A plain value as JSON's types; what JSON has not is an object of one key that names the type.

    Raises:
        TypeError: a part of it is no plain value.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return {"int": hex(value)}
    if kind is float:
        return {"float": repr(value)}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is list:
        return [encode(one) for one in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: [encode(one) for one in value]}
    if kind is dict:
        return {"dict": [[encode(key), encode(one)] for key, one in value.items()]}
    raise TypeError(f"the call gave a {kind.__name__}, which is no plain value")


def decode(value: Any) -> Any:
    """The value that ``encode`` wrote.

    Raises:
        ValueError, TypeError: the program's process has written something else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, list):
        return [decode(one) for one in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("not an encoded value")
    ((kind, inner),) = value.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "float":
        return float(inner)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "dict":
        return {decode(key): decode(one) for key, one in inner}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(one) for one in inner)


def equal(expected: Any, given: Any) -> bool:
    """Whether two plain values are the same: types too, but for an integral float, which may stand for an integer.

    Floats may differ by a relative 1e-9 (absolute 1e-12 near 0); a NaN is the same as nothing.
    """
    numeric = (int, float)
    if type(expected) in numeric and type(given) in numeric:
        if type(expected) is type(given) is int:
            return bool(expected == given)
        try:
            return math.isclose(expected, given, rel_tol=1e-9, abs_tol=1e-12)
        except OverflowError:  # an integer beyond all floats
            return False
    if type(expected) is not type(given):
        return False
    if isinstance(expected, list | tuple):
        return len(expected) == len(given) and all(equal(one, other) for one, other in zip(expected, given))
    if isinstance(expected, dict):
        return expected.keys() == given.keys() and all(equal(one, given[key]) for key, one in expected.items())
    return bool(expected == given)
