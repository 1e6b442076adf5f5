r"""The math task on written problems: files of GSM8K's form (Cobbe et al., 2021, arXiv 2110.14168).

A line is ``{"question": ..., "answer": "working\n#### 72"}``. The data name no skills: every item's skill is ``SKILL``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preceptor.errors import UserError
from preceptor.tasks.answers import parse
from preceptor.tasks.arithmetic import Arithmetic
from preceptor.tasks.records import Datum, Item
from preceptor.tasks.sampling import select

SKILL = "word_problems"


SUBSKILL = "unsorted"


WORDED = Arithmetic(form="worded")


@dataclass(frozen=True)
class WrittenProblems:
    """The math task on the problems of one file."""

    problems: tuple[Item, ...]
    """The file's problems in order (``read_problems``)."""
    name: str = "math"

    @property
    def skills(self) -> Mapping[str, tuple[str, ...]]:
        """The skills and subskills that the problems name, in order of appearance."""
        found: dict[str, dict[str, None]] = {}
        for item in self.problems:
            found.setdefault(item.skill, {})[item.subskill] = None
        return {skill: tuple(subskills) for skill, subskills in found.items()}

    def items(self, count: int, *, seed: int, skill: str | None = None, subskill: str | None = None) -> list[Item]:
        """A random choice of the problems without repetition.

        Raises:
            UserError: the skill is unknown, or there are fewer problems than asked for.
        """
        wanted = select(self.skills, skill, subskill)
        pool = [item for item in self.problems if item.subskill in wanted.get(item.skill, ())]
        if not 0 <= count <= len(pool):
            raise UserError(f"{count} problems were asked for, and the data hold {len(pool)}; ask for at most as many.")
        return random.Random(seed).sample(pool, count)

    def score(self, items: Sequence[Item], responses: Sequence[str]) -> list[bool]:
        """Whether each response gives the right number.

        Raises:
            UserError: there are not as many responses as items.
        """
        return WORDED.score(items, responses)

    def correct(self, item: Item, response: str) -> bool:
        """Whether the response's final number is the right one."""
        return WORDED.correct(item, response)

    def datum(self, item: Item) -> Datum:
        """The item with the data's own working and answer."""
        return WORDED.datum(item)

    def prompt(self, item: Item) -> str:
        """The text that a student reads."""
        return WORDED.prompt(item)


def read_problems(path: Path) -> WrittenProblems:
    """The problems of a JSONL file; the calculator's marks (``<<48/2=24>>``) are taken out of the working.

    Raises:
        UserError: the file is missing or empty, or a line is not of this form; the line is named.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; give a JSONL file of questions and answers in GSM8K's form.")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise UserError(f"The file {path} holds no problem; give one with at least one line.")
    items = [_read(line, number, path) for number, line in enumerate(lines, 1)]
    return WrittenProblems(tuple(items))


def _read(line: str, number: int, path: Path) -> Item:
    try:
        row = json.loads(line)
        question, answer = str(row["question"]), str(row["answer"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"Line {number} of {path} is not an object with a question and an answer; mend or remove it."
        ) from error
    work, mark, truth = answer.rpartition("####")
    truth = truth.strip().replace(",", "")
    if not mark or parse(truth, strict=True) is None:
        raise UserError(
            f"The answer in line {number} of {path} does not end with #### and a number; mend or remove it."
        )
    work = re.sub(r"<<[^<>]*>>", "", work).strip()
    return Item(f"{path.stem}-{number}", "math", SKILL, SUBSKILL, question.strip(), truth, work=work)
