"""The code task: small programming problems over named skills, judged by running the student's program on tests.

Every problem is a function ``f`` whose body is one expression. ``compact`` (``a plus b, times 3: def f(a,b):return ``
answered by ``(a+b)*3``) can be learnt by a character model from nothing; ``worded`` is for language models, which
answer with the rest of the starter or with a whole program, in a code block or bare. Programs run in
``preceptor.sandbox``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from preceptor.errors import UserError
from preceptor.sandbox import Program, Reason, Sandbox, Verdict, read_tests
from preceptor.tasks.generated import GeneratedTask
from preceptor.tasks.records import Datum, Item, same_length

CALLS = 5  # tests of a problem


@dataclass(frozen=True)
class ProgramProblem:
    """A problem: what ``f`` shall do in few words and in a sentence, its parameters, its body, arguments to test it."""

    compact: str
    worded: str
    parameters: str
    body: str
    arguments: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Programs(GeneratedTask):
    """The code task. The sandbox's workers start with the first program; ``close`` ends them."""

    form: Literal["compact", "worded"] = "compact"
    """compact: few words, and the rest of one line as the answer; worded: a sentence, and any program as the answer."""
    only: tuple[str, ...] = ()
    """Skills (``strings``) or subskills (``strings/middle``) to examine; empty: all of them."""
    sandbox: Sandbox = field(default_factory=Sandbox)
    """Where programs run, with their limits."""
    name: str = "code"

    def judge(self, items: Sequence[Item], responses: Sequence[str]) -> list[Verdict]:
        """The verdict on each response's program; equal programs with equal tests are run once.

        An item whose tests cannot be read (a teacher may write such) fails with that reason.

        Raises:
            UserError: there are not as many responses as items, or this machine cannot isolate programs.
        """
        same_length(items, responses)
        programs = [Program(program_of(item, response), item.tests) for item, response in zip(items, responses)]
        unreadable = {tests: reason for tests in {one.tests for one in programs} if (reason := _unreadable(tests))}
        runnable = [one for one in dict.fromkeys(programs) if one.tests not in unreadable]
        verdicts = dict(zip(runnable, self.sandbox.judge(runnable)))
        return [verdicts.get(one) or Verdict(Reason.FAILED, unreadable[one.tests], 0, 0, 0.0) for one in programs]

    def score(self, items: Sequence[Item], responses: Sequence[str]) -> list[bool]:
        """Whether each response's program passes its tests.

        Raises:
            UserError: there are not as many responses as items, or this machine cannot isolate programs.
        """
        return [verdict.passed for verdict in self.judge(items, responses)]

    def correct(self, item: Item, response: str) -> bool:
        """Whether the response's program passes its tests."""
        return self.score([item], [response])[0]

    def datum(self, item: Item) -> Datum:
        """The item with its reference solution: the rest of the line when compact, else the program in a code block.

        A truth may be the rest of the starter's line, as here, or the whole function, as a teacher writes it.
        """
        response = item.truth if self.form == "compact" else f"```python\n{program_of(item, item.truth)}\n```"
        kept = (item.id, item.instruction, response, item.truth, item.skill, item.subskill)
        return Datum(*kept, starter=item.starter, tests=item.tests)

    def prompt(self, item: Item) -> str:
        """The text that a student reads."""
        if self.form == "compact":
            return f"{item.instruction}: {item.starter}"
        return f"{item.instruction} Complete this program, and write nothing else:\n\n{item.starter}"

    def close(self) -> None:
        """End the sandbox's workers."""
        self.sandbox.close()

    def _item(self, skill: str, subskill: str, stream: Random) -> Item:
        problem = SKILLS[skill][subskill](stream)
        compact = self.form == "compact"
        parameters = problem.parameters if compact else problem.parameters.replace(",", ", ")
        starter = f"def f({parameters}):return " if compact else f"def f({parameters}):\n    return "
        text = problem.compact if compact else f"Write a Python function f({parameters}) that returns {problem.worded}."
        tests = _tests(starter + problem.body, problem.arguments)
        return Item("", self.name, skill, subskill, text, problem.body, starter=starter, tests=tests)


def program_of(item: Item, response: str) -> str:
    """The program in a response: its last code block, or itself; after the starter unless it defines a function."""
    blocks = re.findall(r"```[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", response, re.DOTALL)
    code = str(blocks[-1]) if blocks else response
    if re.search(r"^\s*(?:def|class|import|from)\s", code, re.MULTILINE) or not item.starter:
        return code
    if item.starter.endswith("return "):
        code = code.lstrip().removeprefix("return ")
    return item.starter + code


def _unreadable(tests: str) -> str:
    try:
        read_tests(tests)
    except UserError as error:
        return str(error)
    return ""


def _tests(program: str, arguments: Sequence[tuple[Any, ...]]) -> str:
    """The tests that the reference solution, one of those below and thus safe to run here, passes."""
    space: dict[str, Any] = {}
    exec(program, space)
    calls = (f"f({', '.join(map(repr, values))}) == {space['f'](*values)!r}" for values in arguments)
    return "\n".join(calls)


def _pairs(stream: Random) -> tuple[tuple[int, int], ...]:
    pairs = [(stream.randint(-20, 20), stream.randint(-20, 20)) for _ in range(CALLS - 1)]
    return ((0, 1), *pairs)


def _lists(stream: Random, threshold: int) -> tuple[tuple[list[int]], ...]:
    """Lists with members about a threshold, and the empty one."""
    lists = [[threshold + stream.randint(-9, 9) for _ in range(stream.randint(3, 7))] for _ in range(CALLS - 2)]
    return ([],), ([threshold - 1, threshold, threshold + 1],), *((one,) for one in lists)


def _words(stream: Random, letter: str = "") -> tuple[tuple[str], ...]:
    """Words of up to 30 letters, the empty one among them, all but that one with ``letter`` in it."""
    words = ["".join(stream.choices(_LETTERS, k=length)) for length in (4, 9, 17, 30)]
    return ("",), *((word[:2] + letter + word[2:] + letter,) for word in words)


def _chain(stream: Random) -> ProgramProblem:
    k, (sign, word, worded) = stream.randint(2, 199), stream.choice(_SIGNS)
    body = f"(a{sign}b)*{k}"
    return ProgramProblem(f"a {word} b, times {k}", f"{worded}, multiplied by {k}", "a,b", body, _pairs(stream))


def _precedence(stream: Random) -> ProgramProblem:
    k, (sign, word, _) = stream.randint(2, 199), stream.choice(_SIGNS)
    worded = f"a {word} the product of {k} and b"
    return ProgramProblem(f"a {word} {k} times b", worded, "a,b", f"a{sign}{k}*b", _pairs(stream))


def _remainder(stream: Random) -> ProgramProblem:
    k, one = stream.randint(3, 199), stream.choice(("a", "b"))
    numbers = tuple((stream.randint(0, 300), stream.randint(0, 300)) for _ in range(CALLS))
    return ProgramProblem(f"{one} mod {k}", f"the remainder when {one} is divided by {k}", "a,b", f"{one}%{k}", numbers)


def _middle(stream: Random) -> ProgramProblem:
    start, stop = sorted(stream.sample(range(1, 26), 2))
    upper = stream.random() < 0.5
    ending, worded = (".upper()", ", in capital letters") if upper else ("", "")
    compact = f"from {start} to {stop}{' upper' if upper else ''}"
    worded = f"the letters of s from index {start} up to and without index {stop}{worded}"
    return ProgramProblem(compact, worded, "s", f"s[{start}:{stop}]{ending}", _words(stream))


def _ending(stream: Random) -> ProgramProblem:
    k, letter = stream.randint(1, 25), stream.choice(_LETTERS)
    worded = f"the last {k} letters of s, followed by the letter {letter}"
    return ProgramProblem(f"last {k} then {letter}", worded, "s", f"s[-{k}:]+'{letter}'", _words(stream))


def _joining(stream: Random) -> ProgramProblem:
    k, letter = stream.randint(2, 19), stream.choice(_LETTERS)
    worded = f"s repeated {k} times, followed by the letter {letter}"
    return ProgramProblem(f"s {k} times then {letter}", worded, "s", f"s*{k}+'{letter}'", _words(stream))


def _filtering(stream: Random) -> ProgramProblem:
    k, (sign, word) = stream.randint(2, 199), stream.choice(_ORDERS)
    worded = f"the list of the numbers in a that are {word} {k}"
    return ProgramProblem(f"keep {word} {k}", worded, "a", f"[x for x in a if x{sign}{k}]", _lists(stream, k))


def _multiples(stream: Random) -> ProgramProblem:
    k, keep = stream.randint(2, 199), stream.random() < 0.5
    sign, word = ("==", "multiples") if keep else ("!=", "no multiples")
    lists = tuple(([k * stream.randint(-3, 3) + stream.choice((0, 0, 1)) for _ in range(6)],) for _ in range(CALLS))
    worded = f"the list of the numbers in a that are {word} of {k}"
    return ProgramProblem(f"keep {word} of {k}", worded, "a", f"[x for x in a if x%{k}{sign}0]", lists)


def _changing(stream: Random) -> ProgramProblem:
    k, (sign, word) = stream.randint(2, 199), stream.choice((("*", "times"), ("+", "plus"), ("-", "minus")))
    worded = f"the list of the numbers in a, each {word} {k}"
    return ProgramProblem(f"each {word} {k}", worded, "a", f"[x{sign}{k} for x in a]", _lists(stream, k))


def _count_numbers(stream: Random) -> ProgramProblem:
    k, (sign, word) = stream.randint(2, 199), stream.choice(_ORDERS)
    worded = f"how many numbers in a are {word} {k}"
    return ProgramProblem(f"count {word} {k}", worded, "a", f"sum(x{sign}{k} for x in a)", _lists(stream, k))


def _count_letters(stream: Random) -> ProgramProblem:
    first, second = stream.sample(_LETTERS, 2)
    worded = f"how often the letters {first} and {second} occur in s, together"
    body = f"s.count('{first}')+s.count('{second}')"
    return ProgramProblem(f"count {first} and {second}", worded, "s", body, _words(stream, first + second))


def _loop(stream: Random) -> ProgramProblem:
    k, (sign, word) = stream.randint(2, 199), stream.choice((("*", "times"), ("+", "plus"), ("-", "minus")))
    worded = f"the sum of i {word} {k} over all i from 0 up to and without n"
    body = f"sum(i{sign}{k} for i in range(n))"
    return ProgramProblem(f"sum i {word} {k} below n", worded, "n", body, tuple((n,) for n in (0, 1, 2, 5, 12)))


def _squares(stream: Random) -> ProgramProblem:
    k, start, power = stream.randint(2, 29), stream.randint(0, 9), stream.choice((2, 3))
    worded = f"the sum of i to the power {power} over i from {start} up to and without n in steps of {k}"
    body = f"sum(i**{power} for i in range({start},n,{k}))"
    arguments = tuple((n,) for n in (0, 1, k + 1, 3 * k, 5 * k + 2))
    return ProgramProblem(f"sum i power {power} from {start} step {k}", worded, "n", body, arguments)


def _recursion(sign: str, word: str) -> Callable[[Random], ProgramProblem]:
    def draw(stream: Random) -> ProgramProblem:
        k, step = stream.randint(1, 99), stream.choice((1, 2, 3))
        body = f"{k} if n<1 else n{sign}f(n-{step})"
        worded = f"{k} where n is below 1, and else n {word} f(n - {step}), by recursion"
        compact = f"{k} below 1 else n {word} f {step} less"
        return ProgramProblem(compact, worded, "n", body, tuple((n,) for n in (-1, 0, 1, 4, 9)))

    return draw


def _choice(stream: Random) -> ProgramProblem:
    k, (sign, word) = stream.randint(2, 199), stream.choice(_ORDERS)
    first, second = stream.sample(("a", "b"), 2)
    near = tuple((k + stream.randint(-3, 3), stream.randint(200, 300)) for _ in range(CALLS - 3))
    arguments = ((k - 1, 500), (k, 501), (k + 1, 502), *near)
    worded = f"{first} when a is {word} {k}, and else {second}"
    return ProgramProblem(
        f"{first} if a {word} {k} else {second}", worded, "a,b", f"{first} if a{sign}{k} else {second}", arguments
    )


_LETTERS = "abcdefghijklmnopqrst"


_SIGNS = (("+", "plus", "the sum of a and b"), ("-", "minus", "the difference a minus b"))


_ORDERS = ((">", "above"), ("<", "below"))


SKILLS: Mapping[str, Mapping[str, Callable[[Random], ProgramProblem]]] = {
    "arithmetic": {"chain": _chain, "precedence": _precedence, "remainder": _remainder},
    "strings": {"middle": _middle, "ending": _ending, "joining": _joining},
    "lists": {"filtering": _filtering, "multiples": _multiples, "changing": _changing},
    "counting": {"numbers": _count_numbers, "letters": _count_letters},
    "loops": {"sums": _loop, "powers": _squares},
    "recursion": {"adding": _recursion("+", "plus"), "subtracting": _recursion("-", "minus")},
    "conditions": {"choice": _choice},
}


Programs.SKILLS = SKILLS
