"""QuestionSource with verifiable answers, chosen by name: sums of a tunable difficulty, generated problems, or files.

Whatever is drawn, the questions of the exam are none of those that are learned from.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preceptor.errors import UserError
from preceptor.tasks.arithmetic import Arithmetic
from preceptor.tasks.boxed import Verifier, by_text, by_value, read_math, read_utf8
from preceptor.tasks.contamination import leaks
from preceptor.tasks.gsm8k import read_problems
from preceptor.tasks.records import Item
from preceptor.tasks.sampling import draw_items

SUMS = "sums"


PROBLEMS = "problems"


@dataclass(frozen=True)
class QuestionSource:
    """Where questions come from, and how an answer is compared."""

    source: str = SUMS
    """``sums``, ``problems`` (generated, over named skills), or a file or folder in GSM8K's or MATH's form."""
    terms: int = 2
    """Of ``sums``: how many numbers are added."""
    smallest: int = 10
    """Of ``sums``: the smallest number."""
    largest: int = 99
    """Of ``sums``: the largest number."""
    skills: tuple[str, ...] = ()
    """Of ``problems``: skills (``addition``) or subskills (``division/remainder``); empty: all."""
    count: int = 512
    """QuestionSource that are tried, at most."""
    exam: int = 200
    """QuestionSource of the exam; they are kept apart from those that are learned from."""
    exam_source: str = ""
    """A file or folder to examine in; empty: questions of ``source``."""
    compare: Literal["value", "text"] = "value"
    """Answers are right by their value (18.0 is 18), or letter by letter as in the authors' scripts."""

    def __post_init__(self) -> None:
        """Refuse sizes and ranges that leave no question."""
        for name, value in (("terms", self.terms), ("count", self.count), ("exam", self.exam)):
            if value < 1:
                raise UserError(f"questions.{name} is {value}; it must be at least 1.")
        if not 0 <= self.smallest <= self.largest:
            raise UserError(
                f"The numbers of a sum go from {self.smallest} to {self.largest}: questions.smallest must be 0 or "
                "more, and questions.largest no less."
            )
        if self.exam_source in (SUMS, PROBLEMS):
            raise UserError(
                f"questions.exam_source is {self.exam_source}, and only a file or a folder can be examined in beside "
                "questions.source: give one, or leave it empty."
            )

    @property
    def verifier(self) -> Verifier:
        """How an answer is read and judged."""
        return by_value if self.compare == "value" else by_text


def draw(questions: QuestionSource, seed: int) -> tuple[list[Item], list[Item]]:
    """The questions to learn from and those of the exam, no text in both; the same seed draws the same ones.

    Raises:
        UserError: no such file, a question without an answer, or fewer questions than are wanted.
    """
    found = _shuffled(_found(questions, seed), seed)
    apart = _shuffled(list(read_file(Path(questions.exam_source))), seed) if questions.exam_source else found
    exam = apart[: questions.exam]
    generated = questions.source in (SUMS, PROBLEMS) and apart is found
    known = {item.id for item in exam} if generated else leaks(found, exam)
    rest = [item for item in found if item.id not in known][: questions.count]
    if len(exam) < questions.exam or (not rest and apart is found):
        raise UserError(
            f"{questions.exam_source or questions.source} has {len(apart)} different questions, and {questions.exam} "
            "are for the exam: give more or wider ones, or set questions.exam lower."
        )
    if not rest:
        raise UserError(
            f"All {len(found)} questions of {questions.source} are in {questions.exam_source} too: give others to "
            "learn from, or set questions.exam lower."
        )
    return rest, exam


def _found(questions: QuestionSource, seed: int) -> list[Item]:
    wanted = questions.count + (0 if questions.exam_source else questions.exam)
    if questions.source == SUMS:
        name = f"{questions.terms} terms"
        return draw_items(lambda skill, _, stream: _sum(questions, skill, stream), {name: ("",)}, wanted, seed)
    if questions.source == PROBLEMS:
        return Arithmetic(form="worded", only=questions.skills).items(wanted, seed=seed)
    return list(read_file(Path(questions.source)))


def _shuffled(items: list[Item], seed: int) -> list[Item]:
    """Each text once, in an order that follows from the seed."""
    once = list({item.instruction: item for item in items}.values())
    random.Random(seed).shuffle(once)
    return once


def read_file(path: Path) -> tuple[Item, ...]:
    """The questions of a file or folder, in GSM8K's form or MATH's, whichever it is.

    Raises:
        UserError: there is nothing, it is no UTF-8, it has neither form, or a question lacks its answer.
    """
    if path.is_dir():
        return read_math(path)
    if not path.is_file():
        raise UserError(
            f"There is no file or folder {path} with questions: give {SUMS}, {PROBLEMS}, a file in GSM8K's "
            "form, or MATH's folder or file."
        )
    first = next((line for line in read_utf8(path).split("\n") if line.strip()), "")
    try:
        names = set(json.loads(first))
    except (ValueError, TypeError):
        names = set()
    return read_math(path) if "problem" in names else read_problems(path).problems


def _sum(questions: QuestionSource, skill: str, stream: random.Random) -> Item:
    """A sum in the one order that its numbers decide: 3 + 5 and 5 + 3 would be one question twice."""
    numbers = sorted(stream.randint(questions.smallest, questions.largest) for _ in range(questions.terms))
    random.Random(str(numbers)).shuffle(numbers)
    added = " + ".join(map(str, numbers))
    return Item("", "math", skill, "", f"What is {added}?", f"{sum(numbers)}", work=f"{added} = {sum(numbers)}")
