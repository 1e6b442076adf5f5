"""Common errors: of many sampled solutions of a problem, one that holds the wrong answer most of them agree on.

Source: MathDial, v1, appendix A (Macina et al. 2023, https://arxiv.org/abs/2305.14536). N = 50 solutions a problem are
drawn at temperature 0.7; the answer is the first number after ``####``; with counts c(a) the common error is

    argmax over a != gold of c(a)

and the filters follow in the order in which the paper reports them. Decided here: a tie goes to the answer that was
sampled first, and of the chosen group the first solution that passes the filters is taken.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.dialogue.dialogue import Dialogue
from preceptor.errors import UserError
from preceptor.language import Chat, Message, Request

Sampler = Callable[[Sequence[str]], list[list[str]]]


"""From problems to the solutions that were drawn for each."""


_NUMBER = re.compile(r"[-\u2212]?\$?\s?(\d[\d,]*(?:\.\d+)?|\.\d+)")


_MARK = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


_PLAIN = re.compile(r"[\d+\-*/(). ]+")


SHOTS = (
    (
        "A farmer has 3 baskets of 12 apples and gives 8 apples away. How many are left?",
        "There are 3 * 12 = <<3*12=36>>36 apples.\nAfter giving 8 away, 36 - 8 = <<36-8=28>>28 are left.\n#### 28",
    ),
    (
        "A ticket costs 4 dollars. Ana buys 5 tickets and pays with 30 dollars. How much does she get back?",
        "The tickets cost 4 * 5 = <<4*5=20>>20 dollars.\nShe gets back 30 - 20 = <<30-20=10>>10 dollars.\n#### 10",
    ),
)


@dataclass(frozen=True)
class CommonErrors:
    """How solutions are drawn, and which of them are kept."""

    samples: int = 50
    """N, solutions drawn for a problem."""
    temperature: float = 0.7
    """Sampling temperature; the whole vocabulary is sampled."""
    max_tokens: int = 256
    """Tokens of a solution at most."""
    arithmetic: float | None = 0.01
    """Largest slip in a mark ``<<a op b = c>>``: the aim is conceptual errors. None checks none."""
    max_steps: int = 4
    """Steps of the worked solution at most: the text says 4; its count line speaks of more than 5 being removed."""
    rounding: float = 0.1
    """A wrong answer this near to the right one is rounding, not an error."""
    shortest: int = 300
    """Characters of a solution at least."""
    longest: int = 500
    """Characters of a solution at most."""
    unanimity: float = 0.98
    """A wrong answer that this share of the samples gives (49 of 50) means a wrong key or an ambiguous text."""
    mark: str = "####"
    """What stands before the answer."""

    def __post_init__(self) -> None:
        """Refuse settings that keep nothing."""
        if self.samples < 1 or self.max_steps < 1:
            raise UserError("errors.samples and errors.max_steps must be at least 1.")
        if self.shortest > self.longest:
            raise UserError(f"errors.shortest is {self.shortest} and errors.longest {self.longest}: turn them round.")


@dataclass(frozen=True)
class Picked:
    """The common error of a problem: a solution, its answer, how often it was drawn; or the filter that found none."""

    solution: str = ""
    answer: float = math.nan
    count: int = 0
    refused: str = ""


def answer_of(solution: str, mark: str = "####") -> float | None:
    """The first number after the mark, commas removed; None where there is no mark or no number."""
    _, found, rest = solution.partition(mark)
    number = _NUMBER.search(rest) if found else None
    if number is None:
        return None
    value = float(number[1].replace(",", ""))
    return -value if number[0][0] in "-\u2212" else value


def steps_of(solution: str, mark: str = "####") -> int:
    """The lines of a worked solution without the answer's."""
    return sum(1 for line in solution.split("\n") if line.strip() and not line.startswith(mark))


def marks_of(solution: str) -> list[tuple[str, float]]:
    """The calculator marks ``<<a op b = c>>`` that can be recomputed: how the result is written, and how far it is off.

    A mark whose operation is not plain arithmetic, or divides by zero, is infinitely far off.
    """
    return [(operation, _slip(operation, result)) for operation, result in _MARK.findall(solution)]


def _slip(operation: str, result: str) -> float:
    operation, result = (part.replace(",", "").replace("$", "").replace(" ", "") for part in (operation, result))
    operation = re.sub(r"(\d+(?:\.\d*)?|\.\d+)%", r"(\1/100)", operation)
    percent = result.endswith("%")
    try:
        return abs(arithmetic(operation) - float(_fraction(result.rstrip("%"))) / (100 if percent else 1))
    except (ValueError, ZeroDivisionError, OverflowError):
        return math.inf


def _fraction(text: str) -> float:
    top, slash, bottom = text.partition("/")
    return float(top) / float(bottom) if slash else float(top)


def arithmetic(expression: str) -> float:
    """The value of digits, + - * / // and brackets; nothing is evaluated as code.

    Raises:
        ValueError: anything else. ZeroDivisionError: a division by zero.
    """
    if not _PLAIN.fullmatch(expression):
        raise ValueError(f"'{expression}' is no arithmetic")
    tokens = re.findall(r"\d+(?:\.\d*)?|\.\d+|//|[-+*/()]", expression)
    value, rest = _sum(tokens, 0)
    if rest != len(tokens):
        raise ValueError(f"'{expression}' is no arithmetic")
    return value


def _sum(tokens: Sequence[str], at: int) -> tuple[float, int]:
    value, at = _product(tokens, at)
    while at < len(tokens) and tokens[at] in "+-":
        sign = 1 if tokens[at] == "+" else -1
        term, at = _product(tokens, at + 1)
        value += sign * term
    return value, at


def _product(tokens: Sequence[str], at: int) -> tuple[float, int]:
    value, at = _factor(tokens, at)
    while at < len(tokens) and tokens[at] in ("*", "/", "//"):
        operator = tokens[at]
        factor, at = _factor(tokens, at + 1)
        value = value * factor if operator == "*" else value / factor if operator == "/" else value // factor
    return value, at


def _factor(tokens: Sequence[str], at: int) -> tuple[float, int]:
    token = tokens[at] if at < len(tokens) else ""
    if token in ("+", "-"):
        value, at = _factor(tokens, at + 1)
        return (value if token == "+" else -value), at
    if token == "(":
        value, at = _sum(tokens, at + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError("a bracket is not closed")
        return value, at + 1
    return float(token), at + 1


def pick(worked: str, samples: Sequence[str], settings: CommonErrors) -> Picked:
    """The common error among samples, or the filter at which the problem was lost.

    Args:
        worked: the worked solution, its answer after the mark.
        samples: solutions that were drawn.
        settings: the filters.

    Raises:
        UserError: the worked solution has no answer.
    """
    gold = answer_of(worked, settings.mark)
    if gold is None:
        raise UserError(f"A worked solution has no number after '{settings.mark}': {worked[:60]!r}.")
    if steps_of(worked, settings.mark) > settings.max_steps:
        return Picked(refused="steps")
    answers = [answer_of(sample, settings.mark) for sample in samples]
    wrong = [(answer, sample) for answer, sample in zip(answers, samples) if answer is not None and answer != gold]
    if not wrong:
        return Picked(refused="no wrong answer")
    counts = Counter(answer for answer, _ in wrong if abs(answer - gold) > settings.rounding)
    if not counts:
        return Picked(refused="rounding")
    [(common, count)] = counts.most_common(1)  # of equal counts, the one that came first
    members = [sample for answer, sample in wrong if answer == common]
    kept = [sample for sample in members if _is_sound(sample, settings)]
    if not kept:
        return Picked(answer=common, count=count, refused="arithmetic")
    kept = [sample for sample in kept if settings.shortest <= len(sample) <= settings.longest]
    if not kept:
        return Picked(answer=common, count=count, refused="length")
    if count >= settings.unanimity * len(samples):
        return Picked(answer=common, count=count, refused="unanimity")
    return Picked(kept[0], common, count)


def _is_sound(solution: str, settings: CommonErrors) -> bool:
    return settings.arithmetic is None or all(slip <= settings.arithmetic for _, slip in marks_of(solution))


def read_problems(path: Path, *, limit: int | None = None) -> list[tuple[str, str]]:
    """The problems and worked solutions of a JSON Lines file with ``question`` and ``answer``, as GSM8K has them.

    Raises:
        UserError: no such file, or another form.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return [(str(line["question"]), str(line["answer"])) for line in lines[:limit]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as problems ({error!r}): give JSON Lines with question, answer.") from (
            error
        )


def chat_sampler(chat: Chat, settings: CommonErrors, *, seed: int = 0) -> Sampler:
    """Solutions by a language model, asked with two worked examples in GSM8K's form.

    A call that failed gives an empty solution, with a warning; where all fail, a ``UserError`` is raised.
    """
    shots: list[Message] = []
    for question, solution in SHOTS:
        shots += [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]

    def draw(problems: Sequence[str]) -> list[list[str]]:
        requests = [
            Request(
                (*shots, {"role": "user", "content": problem}),
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=seed + place,
            )
            for problem in problems
            for place in range(settings.samples)
        ]
        replies = chat.ask(requests)
        failures = [reply.error for reply in replies if reply.error]
        if failures and len(failures) == len(replies):
            raise UserError(f"No call for a solution was answered ({failures[0]}): see to the model, and run again.")
        if failures:
            failed = f"{len(failures)} of {len(replies)} calls for solutions failed ({failures[0]})"
            warnings.warn(f"{failed}: their problems have fewer samples.", stacklevel=2)
        texts = [reply.text for reply in replies]
        return [texts[start : start + settings.samples] for start in range(0, len(texts), settings.samples)]

    return draw


def common_errors(
    problems: Sequence[tuple[str, str]], sampler: Sampler, settings: CommonErrors, personas: Sequence[str]
) -> tuple[list[Dialogue], dict[str, int]]:
    """Dialogues to be held about the common errors of problems, and how many problems each filter took.

    Args:
        problems: text and worked solution.
        sampler: draws solutions; problems with too many steps are not asked about.
        settings: the filters.
        personas: given to the dialogues in turn.
    """
    asked = [one for one in problems if steps_of(one[1], settings.mark) <= settings.max_steps]
    picked = [pick(worked, drawn, settings) for (_, worked), drawn in zip(asked, sampler([text for text, _ in asked]))]
    lost = Counter(one.refused for one in picked if one.refused)
    lost["steps"] = len(problems) - len(asked)
    dialogues: list[Dialogue] = []
    for (text, worked), one in zip(asked, picked, strict=True):
        if not one.refused:
            role = personas[len(dialogues) % len(personas)]
            dialogues.append(Dialogue(text, _clean(worked, settings), _clean(one.solution, settings), role))
    return dialogues, {"asked": len(asked), "picked": len(dialogues), **lost}


def _clean(solution: str, settings: CommonErrors) -> str:
    """A solution as the released dialogues have it: without calculator marks, the answer alone in the last line."""
    steps, _, answer = _MARK.sub("", solution).partition(settings.mark)
    return f"{steps.strip()}\n {answer.strip()}"
