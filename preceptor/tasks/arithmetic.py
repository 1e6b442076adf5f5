"""The math task: generated problems over named skills, with exact answers.

Every problem exists in two forms. ``compact`` (``37+58=`` answered by ``95``) is short enough for a character model of
two layers that learns from nothing; ``worded`` is for language models: a worked line, then ``#### 95``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Literal

from preceptor.tasks.answers import same, written
from preceptor.tasks.generated import GeneratedTask
from preceptor.tasks.records import Datum, Item

FORMAT = "Show the working, then end with a line that holds #### and the number."


@dataclass(frozen=True)
class ArithmeticProblem:
    """A problem in its two forms, the working and the answer."""

    compact: str
    worded: str
    work: str
    answer: str


@dataclass(frozen=True)
class Arithmetic(GeneratedTask):
    """The math task on generated problems."""

    form: Literal["compact", "worded"] = "compact"
    """compact: ``37+58=`` and nothing but the number counts; worded: a sentence, and the last number counts."""
    only: tuple[str, ...] = ()
    """Skills (``addition``) or subskills (``addition/two_digit``) to examine; empty: all of them."""
    name: str = "math"

    def correct(self, item: Item, response: str) -> bool:
        """Whether the response gives the right number, whatever its notation; an unreadable one is wrong."""
        return same(item.truth, response, strict=self.form == "compact")

    def datum(self, item: Item) -> Datum:
        """The item with its answer: the number alone when compact, else the working and ``#### number``."""
        lines = [item.work] if item.work else []
        response = item.truth if self.form == "compact" else "\n".join([*lines, f"#### {item.truth}"])
        return Datum(item.id, item.instruction, response, item.truth, item.skill, item.subskill)

    def prompt(self, item: Item) -> str:
        """The text that a student reads."""
        return item.instruction if self.form == "compact" else f"{item.instruction}\n{FORMAT}"

    def _item(self, skill: str, subskill: str, stream: Random) -> Item:
        problem = SKILLS[skill][subskill](stream)
        text = problem.compact if self.form == "compact" else problem.worded
        return Item("", self.name, skill, subskill, text, problem.answer, work=problem.work)


def _add(digits: int) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        a, b = _number(stream, digits), _number(stream, digits)
        return ArithmeticProblem(f"{a}+{b}=", f"What is {a} plus {b}?", f"{a} + {b} = {a + b}", f"{a + b}")

    return draw


def _subtract(digits: int, *, below_zero: bool = False) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        a, b = sorted((_number(stream, digits), _number(stream, digits)), reverse=not below_zero)
        return ArithmeticProblem(f"{a}-{b}=", f"What is {a} minus {b}?", f"{a} - {b} = {a - b}", f"{a - b}")

    return draw


def _multiply(digits: int) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        a, b = _number(stream, digits, least=2), stream.randint(2, 9)
        return ArithmeticProblem(f"{a}*{b}=", f"What is {a} times {b}?", f"{a} × {b} = {a * b}", f"{a * b}")

    return draw


def _powers(stream: Random) -> ArithmeticProblem:
    a, b = stream.randint(2, 999), stream.choice((10, 100, 1000))
    return ArithmeticProblem(f"{a}*{b}=", f"What is {a} times {b}?", f"{a} × {b} = {a * b}", f"{a * b}")


def _divide(largest: int) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        b, c = stream.randint(2, 9), stream.randint(2, largest)
        return ArithmeticProblem(f"{b * c}/{b}=", f"What is {b * c} divided by {b}?", f"{b * c} ÷ {b} = {c}", f"{c}")

    return draw


def _remainder(stream: Random) -> ArithmeticProblem:
    a, b = stream.randint(10, 99), stream.randint(3, 9)
    worded = f"What is the remainder when {a} is divided by {b}?"
    return ArithmeticProblem(f"{a}mod{b}=", worded, f"{a} = {a // b} × {b} + {a % b}", f"{a % b}")


def _same_denominator(stream: Random) -> ArithmeticProblem:
    b = stream.choice((5, 7, 11, 13, 17, 19))  # primes, and a sum below 1: nothing to cancel
    a = stream.randint(1, b - 2)
    c = stream.randint(1, b - 1 - a)
    total = f"{a + c}/{b}"
    return ArithmeticProblem(f"{a}/{b}+{c}/{b}=", f"What is {a}/{b} plus {c}/{b}?", f"({a} + {c})/{b} = {total}", total)


def _equivalent(stream: Random) -> ArithmeticProblem:
    b = stream.randint(3, 9)
    a, c = stream.choice([one for one in range(1, b) if math.gcd(one, b) == 1]), stream.randint(2, 9)
    worded = f"{a}/{b} equals how many {b * c}ths? Give the numerator."
    return ArithmeticProblem(f"{a}/{b}=?/{b * c}:", worded, f"{b} × {c} = {b * c}, so {a} × {c} = {a * c}", f"{a * c}")


def _fraction_of(stream: Random) -> ArithmeticProblem:
    b = stream.randint(2, 9)
    a, c = stream.randint(1, b - 1), b * stream.randint(2, 12)
    work = f"{c} ÷ {b} = {c // b}, and {c // b} × {a} = {c // b * a}"
    return ArithmeticProblem(f"{a}/{b}of{c}=", f"What is {a}/{b} of {c}?", work, f"{c // b * a}")


def _percent_of(stream: Random) -> ArithmeticProblem:
    a, b = stream.choice((5, 10, 20, 25, 50, 75)), 20 * stream.randint(1, 40)
    return ArithmeticProblem(
        f"{a}%of{b}=", f"What is {a}% of {b}?", f"{b} × {a} ÷ 100 = {a * b // 100}", f"{a * b // 100}"
    )


def _percent_share(stream: Random) -> ArithmeticProblem:
    b = stream.choice((10, 20, 25, 50))
    a = stream.randint(1, b)
    work = f"{a} ÷ {b} × 100 = {100 * a // b}"
    return ArithmeticProblem(f"{a}of{b}=?%:", f"What percentage of {b} is {a}?", work, f"{100 * a // b}")


def _percent_change(stream: Random) -> ArithmeticProblem:
    a, b = 20 * stream.randint(1, 40), stream.choice((5, 10, 20, 25, 50))
    change = a * b // 100
    rise = stream.random() < 0.5
    result = a + change if rise else a - change
    verb, sign = ("increased", "+") if rise else ("reduced", "-")
    worded = f"A price of {a} dollars is {verb} by {b}%. What is the new price in dollars?"
    return ArithmeticProblem(
        f"{a}{sign}{b}%=", worded, f"{b}% of {a} is {change}, and {a} {sign} {change} = {result}", f"{result}"
    )


def _convert(pairs: tuple[tuple[str, str, int], ...]) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        large, small, size = stream.choice(pairs)
        if stream.random() < 0.5:
            a = stream.randint(2, 99)
            start, end, result, sign = large, small, Fraction(a * size), "×"
        else:
            a = stream.randint(2, 99) * size // math.gcd(size, 10)
            start, end, result, sign = small, large, Fraction(a, size), "÷"
        worded = f"How many {end} are {a} {start}?"
        return ArithmeticProblem(
            f"{a}{start}=?{end}:", worded, f"{a} {sign} {size} = {written(result)}", written(result)
        )

    return draw


def _extreme(digits: int, word: Literal["max", "min"], *, decimals: int = 0) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        a = b = Fraction(0)
        while a == b:
            places = [stream.randint(1, decimals) if decimals else 0 for _ in range(2)]
            a, b = (Fraction(_number(stream, digits), 10**place) for place in places)
        result = written(max(a, b) if word == "max" else min(a, b))
        adjective, sign = ("larger", ">") if word == "max" else ("smaller", "<")
        other = written(min(a, b) if word == "max" else max(a, b))
        worded = f"Which number is {adjective}: {written(a)} or {written(b)}?"
        return ArithmeticProblem(f"{word} {written(a)} {written(b)}=", worded, f"{result} {sign} {other}", result)

    return draw


def _reverse(digits: int) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        text = "".join(stream.choice("123456789") for _ in range(digits))  # no 0, which would end as a leading one
        worded = f"Write the digits of {text} in reverse order."
        return ArithmeticProblem(f"rev {text}=", worded, f"Backwards: {', '.join(text[::-1])}", text[::-1])

    return draw


def _sequence(kind: Literal["add", "subtract", "multiply"]) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        start, step = stream.randint(1, 50), stream.randint(2, 9)
        if kind == "multiply":
            start, step = stream.randint(1, 20), stream.randint(2, 5)
            terms = [start * step**place for place in range(4)]
        else:
            terms = [start + step * place for place in range(4)][:: 1 if kind == "add" else -1]
        a, b, c, d = terms
        sign = {"add": "+", "subtract": "-", "multiply": "×"}[kind]
        worded = f"Which number comes next: {a}, {b}, {c}?"
        return ArithmeticProblem(f"next {a} {b} {c}=", worded, f"{c} {sign} {step} = {d}", f"{d}")

    return draw


def _story(kind: Literal["gain", "loss", "groups", "sharing"]) -> Callable[[Random], ArithmeticProblem]:
    def draw(stream: Random) -> ArithmeticProblem:
        name, thing = stream.choice(_PEOPLE), stream.choice(_THINGS)
        a, b = stream.randint(10, 60), stream.randint(2, 9)
        compact, story, sign, result = {
            "gain": (f"has {a} gets {b}=", f"{name} has {a} {thing} and gets {b} more.", "+", a + b),
            "loss": (f"has {a} gives {b}=", f"{name} has {a} {thing} and gives {b} away.", "-", a - b),
            "groups": (f"{b} bags of {a}=", f"{name} has {b} bags with {a} {thing} each.", "×", a * b),
            "sharing": (f"{a * b} in {b} bags=", f"{name} puts {a * b} {thing} into {b} equal bags.", "÷", a),
        }[kind]
        left, right = {"groups": (b, a), "sharing": (a * b, b)}.get(kind, (a, b))
        question = (
            f"How many {thing} are in each bag?" if kind == "sharing" else f"How many {thing} does {name} have now?"
        )
        return ArithmeticProblem(compact, f"{story} {question}", f"{left} {sign} {right} = {result}", f"{result}")

    return draw


def _number(stream: Random, digits: int, *, least: int = 0) -> int:
    """A number of exactly so many digits; of one digit, from ``least`` on."""
    return stream.randint(least if digits == 1 else 10 ** (digits - 1), 10**digits - 1)


_PEOPLE = ("Ada", "Ben", "Chen", "Dara", "Emil", "Fatima", "Goran", "Hana", "Ines", "Jamal", "Kofi", "Lena")


_THINGS = ("apples", "beads", "books", "coins", "cards", "eggs", "marbles", "nails", "pencils", "shells", "stamps")


_LENGTHS = (("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10))


_MASSES = (("kg", "g", 1000), ("t", "kg", 1000), ("g", "mg", 1000))


_TIMES = (("h", "min", 60), ("min", "s", 60), ("weeks", "days", 7), ("days", "h", 24))


SKILLS: Mapping[str, Mapping[str, Callable[[Random], ArithmeticProblem]]] = {
    "addition": {"one_digit": _add(1), "two_digit": _add(2), "three_digit": _add(3)},
    "subtraction": {"one_digit": _subtract(1), "two_digit": _subtract(2), "below_zero": _subtract(2, below_zero=True)},
    "multiplication": {"tables": _multiply(1), "powers_of_ten": _powers, "two_digit": _multiply(2)},
    "division": {"tables": _divide(9), "two_digit": _divide(49), "remainder": _remainder},
    "fractions": {"same_denominator": _same_denominator, "equivalent": _equivalent, "of_a_number": _fraction_of},
    "percentages": {"of_a_number": _percent_of, "share": _percent_share, "change": _percent_change},
    "units": {"length": _convert(_LENGTHS), "mass": _convert(_MASSES), "time": _convert(_TIMES)},
    "comparison": {
        "larger": _extreme(3, "max"),
        "smaller": _extreme(3, "min"),
        "decimals": _extreme(3, "max", decimals=2),
    },
    "reversal": {"three_digits": _reverse(3), "four_digits": _reverse(4), "five_digits": _reverse(5)},
    "sequences": {
        "adding": _sequence("add"),
        "subtracting": _sequence("subtract"),
        "multiplying": _sequence("multiply"),
    },
    "word_problems": {kind: _story(kind) for kind in ("gain", "loss", "groups", "sharing")},
}


Arithmetic.SKILLS = SKILLS
